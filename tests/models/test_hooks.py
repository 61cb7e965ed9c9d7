"""Hooks that people hang on modules fire, and what they change counts, while tokens leave as without."""

import copy
import pickle
import warnings
from collections import Counter

import pytest
import torch
from helpers.macs import counted
from helpers.whole_blocks import EARLY, assert_as_by_modules, create_tiny
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

from patchrank.layers.norm_gains import layer_norms
from patchrank.layers.prompts import Prompts
from patchrank.utils.errors import UserError


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# What hooks are: each is hung on a module, counts its calls, and perhaps changes what passes.
def forward_hook(module, calls):
    module.register_forward_hook(lambda *args: calls.update([module]))


def pre_hook(module, calls):
    module.register_forward_pre_hook(lambda *args: calls.update([module]))


def replacing_hook(module, calls):
    module.register_forward_hook(lambda module, args, output: calls.update([module]) or output.roll(1, -1))


def replacing_pre_hook(module, calls):
    module.register_forward_pre_hook(lambda module, args: calls.update([module]) or (args[0].roll(1, -1),))


def full_backward_hook(module, calls):
    module.register_full_backward_hook(lambda *args: calls.update([module]))


def own_forward(module, calls):
    """As accelerate hangs its hooks."""
    old = module.forward
    module.forward = lambda *args, **kwargs: calls.update([module]) or old(*args, **kwargs).roll(1, -1)


HOOKS = [forward_hook, pre_hook, replacing_hook, replacing_pre_hook, full_backward_hook, own_forward]
PARTS = ["", "attn", "attn.qkv", "attn.proj", "norm1", "norm2", "mlp", "mlp.fc1", "attn.q_norm", "ls1"]
PLACES = [f"blocks.{n}.{part}".strip(".") for n in (0, 2) for part in PARTS]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_fire_once_and_what_they_change_counts(hook, place, images):
    calls = Counter()

    def make_hung():
        tower = create_tiny()
        hook(tower.get_submodule(place), calls)
        return tower

    tower = assert_as_by_modules(make_hung, images)
    calls.clear()
    tower(images).sum().backward()
    assert calls == {tower.get_submodule(place): 1}
    calls.clear()
    tower.forward_suffix(tower.forward_prefix(images, 2), 2).sum().backward()
    assert calls == {tower.get_submodule(place): 1}


@pytest.mark.parametrize("place, times", [("blocks.0", 1), ("blocks.0.attn", 1), ("blocks.0.attn.qkv", 2)])
@pytest.mark.parametrize("hook", [forward_hook, replacing_hook, own_forward, replacing_pre_hook])
def test_hooks_on_layer_1_where_its_attention_is_asked_for_before_it_runs(hook, place, times, images):
    """A block is called once, unless what it is given may be changed on the way; qkv sees all tokens, then the rest."""
    calls = Counter()

    def make_hung():
        tower = create_tiny(EARLY)
        hook(tower.get_submodule(place), calls)
        return tower

    tower = assert_as_by_modules(make_hung, images, EARLY)
    calls.clear()
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image
    assert calls.total() == (times if hook in (forward_hook, replacing_hook) else 2)


@pytest.mark.parametrize(
    "register", [register_module_forward_hook, register_module_forward_pre_hook, register_module_full_backward_hook]
)
def test_hooks_on_all_modules_see_every_part_of_every_block(register, images):
    tower, calls = create_tiny(), Counter()
    handle = register(lambda module, *args: calls.update([module]))
    try:
        tower(images).sum().backward()
    finally:
        handle.remove()
    idle = [*(block.attn.attn_drop for block in tower.blocks), tower.blocks]  # fused attention calls no dropout
    expected = [module for block in tower.blocks for module in block.modules() if module not in idle]
    assert {calls[module] for module in expected} == {1}


@pytest.mark.parametrize("hook, place", [(forward_hook, "blocks.2.mlp.act"), (pre_hook, "blocks.2.attn.qkv")])
def test_macs_say_which_way_was_taken(hook, place, images):
    tower = create_tiny()
    before, skipped = tower.macs().image, tower.cls_only
    hook(tower.get_submodule(place), Counter())
    assert skipped and not tower.cls_only
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image > len(images) * before


def doubled(module, args, output):
    return 2 * output


@torch.no_grad()
def test_copies_and_pickles_keep_their_hooks(images):
    tower = create_tiny()
    tower.blocks[1].attn.register_forward_hook(doubled)
    tower.blocks[2].register_forward_hook(doubled)
    expected = tower(images)
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(other(images), expected)
    tower.blocks[2].attn.register_forward_hook(doubled)
    assert not torch.allclose(tower(images), expected)


def prompted(seed=3, **settings):
    tower = create_tiny(**settings)
    prompts = Prompts("V", 2, 32, 32, num_norms=len(layer_norms(tower)))
    with torch.no_grad():
        prompts.norm_gains.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    tower.set_prompts(prompts)
    return tower


@pytest.mark.parametrize("place", ["blocks.0", "blocks.0.norm1", "blocks.1.norm2", "blocks.2", "norm"])
@pytest.mark.parametrize("reducer", ["cls_attention", "center"])
def test_hooks_of_a_tower_with_gains(reducer, place, images):
    plain, tower, calls = prompted(reducer=reducer), prompted(reducer=reducer), Counter()
    forward_hook(tower.get_submodule(place), calls)
    torch.testing.assert_close(tower(images), plain(images), atol=1e-5, rtol=1e-4)
    assert calls.total() == 1
    torch.testing.assert_close(tower.forward_whole(images), plain.forward_whole(images), atol=1e-5, rtol=1e-4)
    replacing_hook(tower.get_submodule(place), calls)
    assert not torch.allclose(tower(images), plain(images), atol=1e-3)
    tower(images).sum().backward()
    assert (tower.prompts.norm_gains.grad.abs().sum(1) > 0).all()


@torch.no_grad()
def test_hooks_on_all_blocks_at_once_are_named(images):
    tower, calls = create_tiny(), Counter()
    forward_hook(tower.blocks, calls)
    with pytest.warns(UserWarning, match="hooks on `blocks` as a whole do not run here"):
        tower(images)
    tower.set_pruning(keep_rate=1.0, drop_counts=None)
    tower(images)
    assert calls.total() == 1


def test_gains_of_a_norm_that_was_replaced_are_not_left_out(images):
    tower = prompted()
    tower.blocks[1].norm1 = nn.Sequential(tower.blocks[1].norm1)
    with pytest.raises(UserError, match="one was replaced by Sequential: try"):
        tower(images)


@torch.no_grad()
@pytest.mark.slow
@torch.no_grad()
def test_towers_with_hooked_blocks_are_compiled_in_pieces(images):
    tower = create_tiny()
    tower.blocks[0].register_forward_hook(doubled)
    torch.compiler.reset()
    compiled = torch.compile(tower, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(images), tower(images), atol=1e-5, rtol=1e-4)


MID = {"drop_counts": (20, 12), "locations": (1, 2)}


@pytest.mark.parametrize("reducer", ["tome", "evit", "diffrate", "evit_drop"])
@pytest.mark.parametrize("hook", [forward_hook, replacing_hook, own_forward])
def test_hooks_on_parts_fire_once_where_tokens_leave_in_mid_block(hook, reducer, images):
    plain, tower, calls = create_tiny(reducer=reducer, **MID), create_tiny(reducer=reducer, **MID), Counter()
    places = [f"blocks.1.{part}" for part in ("attn", "attn.qkv", "norm1", "norm2", "mlp")]
    for place in places:
        hook(tower.get_submodule(place), calls)
    out = tower(images)
    assert calls == {tower.get_submodule(place): 1 for place in places}
    assert torch.allclose(out, plain(images), atol=1e-5) == (hook is forward_hook)


def test_a_hook_on_a_block_that_runs_in_parts_is_refused_by_name(images):
    tower = create_tiny(reducer="evit", **MID)
    forward_hook(tower.blocks[1], Counter())
    with pytest.raises(UserError, match="hooks on the block of layer 2 as a whole would be lost: try to hang them on"):
        tower(images)
