"""Models of timm and transformers, pruned in place, beside their own modules with patches masked."""

import copy

import pytest
import torch
from helpers import toy_hosts

import patchrank
from patchrank.utils.errors import UserError

NOTHING = dict(locations=(2, 3))
DROPPING = dict(locations=(3,), keep_rate=0.5, reducer="center")
MERGING = dict(locations=(2, 3), keep_rate=0.5, reducer="tome")
FITTED = dict(locations=(2, 3), keep_rate=0.5, reducer="predictor", predictor_init="random")


@pytest.fixture(params=toy_hosts.HOSTS)
def name(request):
    if request.param in toy_hosts.OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    return request.param


@pytest.fixture
def model(name):
    return toy_hosts.create(name)


@pytest.fixture
def x():
    return toy_hosts.images()


def outputs(model, x):
    out = model(x)
    return {"": out} if isinstance(out, torch.Tensor) else {key: value for key, value in out.items()}


@torch.no_grad()
def test_a_model_that_keeps_all_is_what_it_was(model, x):
    before, keys = outputs(model, x), list(model.state_dict())
    assert patchrank.prune(model, **NOTHING) is model
    for key, value in outputs(model, x).items():
        assert torch.equal(value, before[key])
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_dropped_patches_are_as_if_masked(model, x):
    whole = toy_hosts.embedding(model, x)
    patchrank.prune(model, **DROPPING)
    found, kept = toy_hosts.embedding(model, x), patchrank.find_tower(model).forward_pruned(x).kept
    expected = toy_hosts.masked(patchrank.unprune(model), x, kept, layer=3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, whole, atol=1e-3)


@pytest.mark.parametrize("settings", [DROPPING, MERGING, FITTED], ids=["dropping", "merging", "predictor"])
@torch.no_grad()
def test_the_tower_inside_gives_what_the_model_gives(model, x, settings):
    patchrank.prune(model, **settings)
    found, tower = toy_hosts.embedding(model, x), patchrank.find_tower(model)
    for same in (tower(x), tower.forward_pruned(x).embedding):
        torch.testing.assert_close(same, found, atol=1e-5, rtol=1e-5)
    assert tower.macs().image < tower.macs_unpruned().image


@torch.no_grad()
def test_unprune_gives_the_very_model_back(model, x):
    before, layers = outputs(model, x), dict(model.named_modules())
    patchrank.unprune(patchrank.prune(model, **FITTED))
    assert dict(model.named_modules()) == layers
    for key, value in outputs(model, x).items():
        assert torch.equal(value, before[key])
    with pytest.raises(UserError, match="not pruned|takes a model of open_clip"):
        patchrank.unprune(model)


@torch.no_grad()
def test_copies_and_settings_of_their_own(model, x):
    patchrank.prune(model, **DROPPING)
    found, twin = outputs(model, x), copy.deepcopy(model)
    patchrank.prune(model, keep_rate=0.25)
    for key, value in outputs(twin, x).items():
        assert torch.equal(value, found[key])
    assert not torch.equal(toy_hosts.embedding(model, x), toy_hosts.embedding(twin, x))
    assert patchrank.find_tower(twin) is not patchrank.find_tower(model)


def test_gradients_reach_every_weight_that_they_reached(model, x):
    def reached():
        model.zero_grad()
        toy_hosts.embedding(model, x).square().sum().backward()
        return {key for key, weight in model.named_parameters() if weight.grad is not None}

    before = reached()
    patchrank.prune(model, **DROPPING)
    assert reached() == before


@torch.no_grad()
def test_a_state_dict_goes_back_and_forth(name, model, x):
    patchrank.prune(model, **FITTED)
    other = toy_hosts.create(name)
    for weight in other.parameters():
        weight.mul_(1.5)
    model.load_state_dict(other.state_dict())
    patchrank.prune(other, predictor=patchrank.find_tower(model).predictor, locations=(2, 3), keep_rate=0.5)
    assert torch.equal(toy_hosts.embedding(model, x), toy_hosts.embedding(other, x))


@torch.no_grad()
def test_every_weight_counts_in_the_fingerprint(name, model):
    tower = patchrank.find_tower(patchrank.prune(model, **NOTHING))
    seen = {tower.blocks_sha256()}
    head = ("head.weight", "head.bias") if name in toy_hosts.OF_TRANSFORMERS or tower.num_classes else ()
    for key, weight in model.named_parameters():
        if "mask_token" not in key and not key.startswith(("pooler.", "visual_projection.", *head)):
            weight.view(-1)[0] += 1.0
            fingerprint = tower.blocks_sha256()
            assert fingerprint not in seen, key
            seen.add(fingerprint)


@torch.no_grad()
def test_half_precision_takes_the_predictor_along(model, x):
    patchrank.prune(model, **FITTED)
    whole = toy_hosts.embedding(model, x)
    low = toy_hosts.embedding(model.bfloat16(), x.bfloat16())
    assert low.dtype is torch.bfloat16
    assert torch.nn.functional.cosine_similarity(low.float(), whole, dim=-1).min() > 0.9


FULL = {
    "timm siglip": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "timm dinov2": dict(img_size=224, patch_size=14, embed_dim=384, depth=12, num_heads=6, init_values=0.1),
    "timm vit": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=1000),
    "timm average": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "timm clip": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=512),
    "timm deit": dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, num_classes=1000),
}
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16)
for _name in toy_hosts.OF_TRANSFORMERS:
    _dinov2 = _name.startswith("Dinov2")
    FULL[_name] = BASE | (dict(mlp_ratio=4, patch_size=14) if _dinov2 else dict(intermediate_size=3072))


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_so_it_is_at_full_size(name):
    model, x = toy_hosts.create(name, noise=0.002, **FULL[name]), toy_hosts.images(2, side=224)
    whole = toy_hosts.embedding(model, x)
    patchrank.prune(model, locations=(4,), keep_rate=0.6, reducer="center")
    tower, found = patchrank.find_tower(model), toy_hosts.embedding(model, x)
    kept, count = tower.forward_pruned(x).kept, tower.num_patches
    expected = toy_hosts.masked(patchrank.unprune(model), x, kept, 4, count)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, whole, atol=1e-3)
    assert torch.equal(toy_hosts.embedding(model, x), whole)


@torch.no_grad()
def test_dynamo_sees_one_graph_of_a_pruned_model():
    model, x = toy_hosts.create("CLIPVisionModel"), toy_hosts.images(2)
    patchrank.prune(model, **MERGING)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = toy_hosts.embedding_of(compiled(x), model)
    torch.testing.assert_close(found, toy_hosts.embedding(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_of_a_pruned_model(model, x):
    patchrank.prune(model, **MERGING)
    expected = toy_hosts.embedding(model, x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(toy_hosts.embedding_of(compiled(x), model), expected, atol=1e-5, rtol=1e-5)
