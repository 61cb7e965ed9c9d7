"""Learned gains of LayerNorms: beside a tower's weights, exact where they are zero, gone when they are taken out."""

import copy

import pytest
import timm
import torch
from helpers.learned_tokens import B, create
from torch import nn

import patchrank
from patchrank.layers.norm_gains import check_gains, layer_norms
from patchrank.layers.prompts import Prompts
from patchrank.models.open_clip.prune import open_clip_configs
from patchrank.models.prompt_files import describe, save_prompts
from patchrank.utils.errors import UserError

NORMS = 26  # norm_pre, two of each of 12 layers, and the last


def gained(seed=3, **changes):
    prompts = create("V", num_norms=NORMS, **changes)
    with torch.no_grad():
        prompts.norm_gains.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return prompts


def folded(tower, gains):
    """The oracle: another tower with the gains multiplied into its weights."""
    other = copy.deepcopy(tower)
    with torch.no_grad():
        for norm, gain in zip(layer_norms(other), gains):
            norm.weight.mul_(1 + gain)
    return other


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"keep_rate": 0.5}, {"keep_rate": 0.5, "reducer": "cls_attention"}])
def test_gains_are_what_weights_times_them_would_be(tower, images, settings):
    tower.set_pruning(predictor_init="random", **settings)
    for norm in layer_norms(tower):
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.weight, 1.0, 0.1)
    prompts, other = gained(), copy.deepcopy(tower)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    tower.set_prompts(prompts)
    other = folded(other, prompts.norm_gains)
    prompts_alone = copy.deepcopy(prompts)
    prompts_alone.norm_gains = None
    other.set_prompts(prompts_alone)
    torch.testing.assert_close(tower(images), other(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tower.forward_features(images), other.forward_features(images), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in tower.state_dict().items())
    assert not torch.allclose(tower(images), tower.forward_whole(images), atol=1e-3)


@torch.no_grad()
def test_gains_of_zero_change_nothing_and_gains_leave_with_their_prompts(tower, images):
    expected = tower(images)
    plain = create("V")
    tower.set_prompts(plain)
    prompted = tower(images)
    zero = create("V", num_norms=NORMS)
    zero.load_state_dict(plain.state_dict() | {"norm_gains": torch.zeros(NORMS, 64)})
    tower.set_prompts(zero)
    assert torch.equal(tower(images), prompted)
    tower.set_prompts(gained())
    with tower.restoring():
        tower.set_prompts(None)
        assert torch.equal(tower(images), expected) and tower.num_prompt_tokens == 0
    assert tower.num_prompt_tokens == B and not torch.equal(tower(images), prompted)
    tower.set_prompts(plain)
    assert torch.equal(tower(images), prompted)
    tower.set_prompts(None)
    assert torch.equal(tower(images), expected)
    assert tower.prompts is None


@pytest.mark.slow
@torch.no_grad()
def test_towers_with_gains_are_compiled_whole(images):
    tower = timm.create_model("patchrank_clip_digits", depth=2, locations=(2,), keep_rate=0.5, reducer="cls_attention")
    prompts = Prompts("V", B, 64, 64, num_norms=6)
    prompts.norm_gains.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    tower.eval().set_prompts(prompts)
    for forward in (tower, tower.forward_whole):
        torch.compiler.reset()
        compiled = torch.compile(forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), forward(images), atol=1e-6, rtol=1e-5)


def test_an_error_inside_leaves_prompts_in_place(tower, images):
    tower.set_prompts(gained())
    expected = tower(images)
    with pytest.raises(KeyError), tower.restoring():
        tower.set_prompts(None)
        raise KeyError
    assert torch.equal(tower(images), expected)


def test_gradients_reach_every_gain_and_no_weight(tower, images):
    prompts = gained()
    tower.requires_grad_(False)
    tower.set_prompts(prompts)
    tower.set_pruning(keep_rate=0.5, predictor_init="random")
    tower(images).square().sum().backward()
    assert (prompts.norm_gains.grad.abs().sum(1) > 0).all() and prompts.text.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_gains_of_another_tower_are_refused_and_change_nothing(tower, images):
    expected = tower(images)
    with pytest.raises(UserError, match=r"norm gains must have shape \(26, 64\) .* but have \(5, 64\)"):
        tower.set_prompts(create("V", num_norms=5))
    assert torch.equal(tower(images), expected) and tower.num_prompt_tokens == 0
    with pytest.raises(UserError, match="norm gains are the image tower's"):
        create("T", num_norms=NORMS)
    with pytest.raises(UserError, match="norm gains must have shape"):
        check_gains(timm.create_model("patchrank_clip_digits", depth=2, locations=(2,)), torch.zeros(26, 64))


def test_a_copy_of_a_tower_has_gains_of_its_own(tower, images):
    tower.set_prompts(gained())
    other, expected = copy.deepcopy(tower), tower(images)
    assert torch.equal(other(images), expected)
    with torch.no_grad():
        other.prompts.norm_gains.zero_()
    assert torch.equal(tower(images), expected) and not torch.equal(other(images), expected)


def test_gains_are_part_of_the_fingerprint():
    first, other = gained(1), gained(2)
    assert isinstance(first, Prompts) and first.sha256() != other.sha256()


@torch.no_grad()
def test_features_only_towers_carry_gains_through_a_look_at_the_tower_as_it_came(tmp_path, clip, images):
    prompts = Prompts("V", B, 64, 64, num_norms=NORMS)
    prompts.norm_gains.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    save_prompts(prompts, tmp_path / "p", describe(clip))
    how = {"pretrained": True, "features_only": True, "out_indices": (3,)}
    tower = timm.create_model("patchrank_clip_digits", prompts_path=tmp_path / "p", **how).eval()
    expected = tower(images)[0]
    with tower.model.restoring():
        tower.model.set_prompts(None)
        torch.testing.assert_close(
            tower(images)[0], timm.create_model("patchrank_clip_digits", **how).eval()(images)[0]
        )
    assert torch.equal(tower(images)[0], expected) and tower.model.num_prompt_tokens == B


@torch.no_grad()
@pytest.mark.parametrize("before", [False, True])
def test_unprune_takes_gains_along_or_gives_those_back_that_were_there(images, before):
    model = open_clip_model("patchrank-digits")
    own, other = gained_for(model.visual.trunk, 1), gained_for(model.visual.trunk, 2)
    model.visual.trunk.set_prompts(own if before else None)
    expected = model.encode_image(images)
    patchrank.prune_open_clip(model, keep_rate=1.0)
    model.visual.trunk.set_prompts(other)
    assert not torch.allclose(model.encode_image(images), expected, atol=1e-3)
    patchrank.unprune(model)
    assert torch.equal(model.encode_image(images), expected)


def gained_for(tower, seed):
    prompts = Prompts("V", B, 64, tower.embed_dim, num_norms=len(layer_norms(tower)))
    prompts.norm_gains.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
    return prompts


def open_clip_model(name):
    import open_clip

    open_clip.add_model_config(open_clip_configs())
    torch.manual_seed(0)
    return open_clip.create_model(name).eval()
