"""Models by name are the models themselves while nothing is pruned, and what `patchrank.prune` makes of them else."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import toy_hosts, toy_hub
from safetensors.torch import save_file
from timm.models import save_for_hf

import patchrank
from patchrank.models.clip import create_clip, create_tower
from patchrank.models.model_name import stable_name
from patchrank.utils.errors import UserError

PRUNED = dict(locations=(2, 3), keep_rate=0.5)
OF_HUB = [*toy_hosts.OF_TRANSFORMERS, *toy_hub.PAIRS, "ViTForImageClassification"]
NAMES = [*(name for name in toy_hosts.OF_TIMM if name != "timm clip"), *OF_HUB]
ONE_OF_EACH = ("timm vit", "timm average without class token", "timm siglip", "ViTForImageClassification")
ONE_OF_EACH += ("CLIPModel", "SiglipModel", "Dinov2WithRegistersModel")


def write_timm(model, folder, name):
    """A folder as timm writes it; the name of the model in it."""
    entry, settings = toy_hosts.OF_TIMM[name]
    save_for_hf(model, str(folder), model_args=toy_hosts.TIMM | settings, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture(
    scope="module",
    params=[name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def made(request, tmp_path_factory):
    """A model, and what names the folder that it was written to."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    if request.param in toy_hosts.OF_TIMM:
        model = toy_hosts.create(request.param)
        return model, write_timm(model, folder, request.param)
    pytest.importorskip("transformers")
    model = toy_hub.create_any(request.param)
    return model, toy_hub.write(model, folder)


def features(model, x):
    """A model's own embedding, not normalised: of a classifier what enters its last layer."""
    if isinstance(model, timm.models.VisionTransformer):
        return model.forward_head(model.forward_features(x), pre_logits=model.num_classes == 5)
    if hasattr(model, "get_image_features"):
        return toy_hosts.pooled(model.get_image_features(x))
    if hasattr(model, "classifier"):
        return model.vit(x).last_hidden_state[:, 0]
    return toy_hosts.embedding(model, x)


@torch.no_grad()
def test_embeddings_and_logits_are_the_models_own(made):
    model, name = made
    x, clip = toy_hosts.images(), create_clip(name)
    torch.testing.assert_close(clip.encode_image(x), F.normalize(features(model, x), dim=-1), atol=1e-6, rtol=0)
    assert (clip.classifier is not None) == (getattr(model, "num_classes", 0) == 5 or hasattr(model, "classifier"))
    if clip.classifier is not None:
        logits = model(x) if isinstance(model(x), torch.Tensor) else model(x).logits
        assert torch.equal(clip.classifier(clip.visual(x)), logits)
    assert clip.name == stable_name(name) == stable_name(clip.name) and "toy@" in clip.name
    assert clip.transform()(toy_hub.picture()).shape == (3, 32, 32)


@torch.no_grad()
def test_a_pruned_tower_is_what_prune_makes_of_the_model(made):
    model, name = made
    x, clip = toy_hosts.images(), create_clip(name, reducer="tome", **PRUNED)
    patchrank.prune(model, reducer="tome", **PRUNED)
    try:
        host, found = patchrank.find_tower(model), clip.visual.forward_pruned(x)
        assert host.blocks_sha256() == clip.visual.blocks_sha256()
        expected = host.forward_pruned(x)
        assert torch.equal(found.kept, expected.kept)
        ours = clip.classifier(found.embedding) if getattr(model, "num_classes", 0) else found.embedding
        torch.testing.assert_close(ours, expected.embedding, atol=1e-5, rtol=1e-5)
    finally:
        patchrank.unprune(model)


@torch.no_grad()
def test_settings_hold_for_a_block_and_the_whole_tower_is_there(made):
    x, clip = toy_hosts.images(), create_clip(made[1])
    before, weights = clip.visual(x), clip.sha256()
    with clip.applied(reducer="center", **PRUNED):
        assert clip.visual.drop_counts == (4, 4)
        torch.testing.assert_close(clip.visual.forward_whole(x), before, atol=1e-6, rtol=0)
        assert not torch.allclose(clip.visual(x), before, atol=1e-4)
    assert torch.equal(clip.visual(x), before) and clip.sha256() == weights and clip.visual.pruner is None


@torch.no_grad()
def test_a_tower_without_weights_has_the_same_shape(made):
    clip = create_clip(made[1])
    with torch.device("meta"):
        tower = create_tower(made[1], reducer="center", **PRUNED)
    assert {k: v.shape for k, v in tower.state_dict().items()} == {
        k: v.shape for k, v in clip.visual.state_dict().items()
    }
    assert tower.drop_counts == (4, 4) and tower.macs().image < clip.visual.macs().image


@torch.no_grad()
@pytest.mark.slow
def test_weights_come_from_a_file_by_the_models_own_names(made, tmp_path):
    model, name = made
    weights = {key: value * 1.5 for key, value in model.state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    x, clip = toy_hosts.images(), create_clip(name, checkpoint=tmp_path / "other.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(weights)
    expected = F.normalize(features(model, x), dim=-1)
    model.load_state_dict(before)
    torch.testing.assert_close(clip.encode_image(x), expected, atol=1e-5, rtol=0)
    key = next(key for key in weights if key.endswith("norm1.weight") or "layernorm_before.weight" in key)
    for change in ({key: torch.ones(7)}, {"stranger.weight": torch.ones(3)}, None):
        wrong = {k: v for k, v in weights.items() if k != key} if change is None else weights | change
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(UserError, match="^checkpoint .*wrong.safetensors: ") as caught:
            create_clip(name, checkpoint=tmp_path / "wrong.safetensors")
        named = "stranger.weight is surplus" if change and key not in change else key
        assert named in str(caught.value) and "\n" not in str(caught.value)
