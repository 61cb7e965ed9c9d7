"""Golden scores, a predictor, pruning and a repair, once through, on towers that are not CLIP's."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import toy_hosts
from torch import nn

import patchrank
from patchrank.data.dataset_factory import load_split
from patchrank.fit import fit_predictor
from patchrank.golden.dataset import Ranked
from patchrank.golden.scores import score_images
from patchrank.layers.pooling import summary
from patchrank.models.clip import Clip
from patchrank.repair import fit_repair
from patchrank.utils.errors import UserError

LOCATION = 3
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, locations=(LOCATION,))


def entry(name):
    def create():
        tower = timm.create_model(name, **SMALL | ({"init_values": 0.5} if "dinov2" in name else {})).eval()
        return tower, tower

    return create


def host(name):
    def create():
        model = patchrank.prune(toy_hosts.create(name), locations=(LOCATION,))
        return model, patchrank.find_tower(model)

    return create


TOWERS = {
    "SigLIP's entry": entry("patchrank_siglip_b16_224"),
    "DINOv2's entry": entry("patchrank_dinov2_s14_reg4"),
    "SigLIP of transformers": host("SiglipVisionModel"),
    "DINOv2 of transformers": host("Dinov2Model"),
}


@pytest.fixture(params=TOWERS.values(), ids=list(TOWERS))
def pair(request):
    if "host" in request.param.__qualname__:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    return request.param()


@torch.no_grad()
def ranked(tower, images):
    scores = score_images(tower, images, window=1, remove_at=LOCATION, metrics=("preservation",)).scores[:, 0]
    x = tower.forward_prefix(images, LOCATION)
    cls = summary(x, tower.num_leading_tokens, tower.has_class_token)
    return Ranked(cls, x[:, tower.num_leading_tokens :], scores.float())


def drift(model, images, whole):
    with torch.no_grad():
        return float((1 - F.cosine_similarity(toy_hosts.embedding(model, images), whole, dim=-1)).mean())


def test_once_through(pair):
    model, tower = pair
    images = toy_hosts.images(24)
    with torch.no_grad():
        whole = toy_hosts.embedding(model, images)
    data = ranked(tower, images)
    predictor = fit_predictor(data, tower.patch_embed.grid_size, "mix_mlp", epochs=60, lr=1e-2, dim=16, quiet=True)
    patchrank.prune(model, predictor=predictor, keep_rate=0.5, locations=(LOCATION,))
    assert drift(model, images, whole) > 0
    scores = tower.forward_pruned(images).scores.detach()
    both = torch.stack([scores.flatten(), data.golden.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.4  # of random numbers it would be 0.05


@pytest.mark.parametrize("pair", [TOWERS[name] for name in TOWERS if "entry" in name], indirect=True)
def test_a_repair_takes_drift_off(pair):
    model, tower = pair
    split = load_split("digits", "val", 60)
    clip = Clip("any", tower, nn.Identity()).eval()
    patchrank.prune(model, keep_rate=0.25, reducer="center", locations=(LOCATION,))
    images = torch.stack([clip.transform()(split.image(place)) for place in range(60)])
    whole = tower.forward_whole(images).detach()
    before, macs = drift(tower, images, whole), tower.macs().image
    repair = fit_repair(clip, [split], quiet=True)
    assert repair.weight.shape == (32, 32)
    tower.pruner.repair = repair
    assert drift(tower, images, whole) < 0.9 * before
    assert tower.macs().image == macs + 32 * 32


def test_classifiers_score_by_their_own_head():
    torch.manual_seed(0)
    tower = timm.create_model("patchrank_deit_s16", **SMALL, num_classes=5).eval()
    nn.init.normal_(tower.head.weight)
    images, labels = toy_hosts.images(3), torch.tensor([0, 1, 4])
    metrics = ("label", "confidence", "preservation")
    found = score_images(tower, images, labels=labels, window=1, remove_at=LOCATION, metrics=metrics, classifier=True)
    x = tower.forward_prefix(images, LOCATION)
    for patch in (0, 7):
        left = torch.cat([x[:, : 1 + patch], x[:, 2 + patch :]], dim=1)
        logits = tower.forward_suffix(left, LOCATION).double()
        damage = 1 - logits.softmax(-1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(found.windows[:, 0, patch], damage, atol=1e-6, rtol=1e-4)
        confidence = 1 - logits.softmax(-1).amax(-1)
        torch.testing.assert_close(found.windows[:, 1, patch], confidence, atol=1e-6, rtol=1e-4)
        features = [tower.forward_suffix(each, LOCATION, pre_logits=True).double() for each in (left, x)]
        moved = 1 - F.cosine_similarity(*features, dim=-1)
        torch.testing.assert_close(found.windows[:, 2, patch], moved, atol=1e-6, rtol=1e-3)
    without = timm.create_model("patchrank_deit_s16", **SMALL, num_classes=0)
    for wrong, head in ((tower, torch.eye(5)), (without, None)):
        with pytest.raises(UserError, match="classifier: the tower's own head"):
            score_images(wrong.eval(), images, head, window=1, remove_at=LOCATION, classifier=True)
