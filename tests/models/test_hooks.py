"""What people hang on modules (hooks, LoRA, reparametrised layers) works while tokens leave as it does without.

The oracle runs every block as a module, whole, and ranks by the matrices that the softmax of attention gave.
"""

import copy
import pickle
import warnings
from collections import Counter
from functools import partial

import pytest
import timm
import torch
from helpers.macs import counted
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from patchrank.layers.norm_gains import layer_norms
from patchrank.layers.prompts import Prompts
from patchrank.utils.errors import UserError

LATE = {2: 20, 3: 12}  # class attention is read in layers 1 and 2, and layer 3 needs its class token alone
EARLY = {1: 20, 3: 12}  # class attention of layer 1 is asked for before it runs


def make(drops=LATE, **settings):
    torch.manual_seed(0)
    shape = {"depth": 3, "embed_dim": 32, "num_heads": 2, "reducer": "cls_attention"}
    shape |= {"locations": tuple(drops), "drop_counts": tuple(drops.values())}
    tower = timm.create_model("patchrank_clip_digits", **shape | settings).eval()
    for name, parameter in tower.named_parameters():
        if name.endswith("qkv.weight"):
            nn.init.normal_(parameter, std=0.3)  # sharp attention, so that rankings have no ties
    return tower


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def attend(block, x):
    """`block(x)` and its class token's row (B, L), from the matrix that the softmax handed to dropout."""
    seen, attn = [], block.attn
    handle = attn.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attn.fused_attn = False
    x = block(x)
    attn.fused_attn = True
    handle.remove()
    return x, seen[0].mean(1)[:, 0]


def by_modules(tower, images, drops=LATE):
    """The oracle: embeddings (B, E) by calls of whole modules."""
    x = tower.embed(images)
    with torch.no_grad():
        row = attend(tower.blocks[0], x)[1] if 1 in drops else None
    for layer, block in enumerate(tower.blocks, 1):
        if layer in drops:
            kept = row[:, 1:].topk(row.shape[1] - 1 - drops[layer]).indices.sort(dim=1).values
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))], dim=1)
        x, row = attend(block, x)
    return tower.forward_head(tower.norm(x))


def assert_as_by_modules(make_hung, images, drops=LATE):
    """Compares a tower that something hangs on with the oracle, each on a tower of its own; gives the first."""
    tower, other = make_hung(), make_hung()
    found, expected = tower(images), by_modules(other, images, drops)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    return tower


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
        tower = make()
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
        tower = make(EARLY)
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
    tower, calls = make(), Counter()
    handle = register(lambda module, *args: calls.update([module]))
    try:
        tower(images).sum().backward()
    finally:
        handle.remove()
    idle = [*(block.attn.attn_drop for block in tower.blocks), tower.blocks]  # fused attention calls no dropout
    expected = [module for block in tower.blocks for module in block.modules() if module not in idle]
    assert {calls[module] for module in expected} == {1}


class Lora(nn.Module):
    """A low-rank update beside a linear layer, as peft writes it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class LowRank(nn.Module):
    """The same as a parametrization of the weight."""

    def __init__(self, weight):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(len(weight), 2)), nn.Parameter(torch.randn(2, weight.shape[1]))

    def forward(self, weight):
        return weight + 0.1 * self.up @ self.down


class Linear8bit(nn.Linear):
    """A linear layer that computes otherwise, as bitsandbytes has it."""

    def forward(self, x):
        return super().forward((8 * x).round() / 8)


def lora(tower, place):
    owner, _, leaf = place.rpartition(".")
    setattr(tower.get_submodule(owner), leaf, Lora(tower.get_submodule(place)))


def low_rank(tower, place):
    linear = tower.get_submodule(place)
    parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))


def eight_bit(tower, place):
    tower.get_submodule(place).__class__ = Linear8bit


def on_linear(function):
    return lambda tower, place: function(tower.get_submodule(place))


CHANGES = {
    "prune": on_linear(partial(prune.l1_unstructured, name="weight", amount=0.5)),
    "weight_norm": on_linear(parametrizations.weight_norm),
    "old weight_norm": on_linear(weight_norm),
    "spectral_norm": on_linear(parametrizations.spectral_norm),
    "old spectral_norm": on_linear(spectral_norm),
    "lora": lora,
    "lora as parametrization": low_rank,
    "subclass": eight_bit,
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1"])
@pytest.mark.parametrize("change", CHANGES)
def test_two_steps_of_training_with_changed_layers(change, layer, images):
    """Weights that are made anew in each call: no stale ones, and no graph that is gone."""
    runs = []
    for forward in (lambda tower: tower(images), lambda tower: by_modules(tower, images)):
        tower = make()
        for block in ("blocks.0", "blocks.2"):
            CHANGES[change](tower, f"{block}.{layer}")
        optimizer = torch.optim.SGD(tower.train().parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            forward(tower).square().mean().backward()
            optimizer.step()
        runs.append((forward(tower.eval()).detach(), dict(tower.named_parameters())))
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("drops", [LATE, EARLY])
def test_a_quantised_tower_runs(drops, images):
    def make_quantised():
        return torch.ao.quantization.quantize_dynamic(make(drops), {nn.Linear})

    with torch.no_grad():
        tower = assert_as_by_modules(make_quantised, images, drops)
    assert not tower.cls_only and tower.macs().image > make(drops).macs().image


@torch.no_grad()
def test_an_attention_whose_class_was_patched_is_called(images, monkeypatch):
    own = timm.layers.Attention.forward
    monkeypatch.setattr(timm.layers.Attention, "forward", lambda *args, **kwargs: own(*args, **kwargs).roll(1, -1))
    assert_as_by_modules(make, images)


@torch.no_grad()
def test_gates_and_norms_of_queries_and_keys_are_read_too(images):
    assert_as_by_modules(partial(make, qk_norm=True), images)
    assert_as_by_modules(partial(make, EARLY, qk_norm=True), images, EARLY)
    assert_as_by_modules(partial(make, scale_attn_norm=True), images)


@pytest.mark.parametrize("hook, place", [(forward_hook, "blocks.2.mlp.act"), (pre_hook, "blocks.2.attn.qkv")])
def test_macs_say_which_way_was_taken(hook, place, images):
    tower = make()
    before, skipped = tower.macs().image, tower.cls_only
    hook(tower.get_submodule(place), Counter())
    assert skipped and not tower.cls_only
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image > len(images) * before


def test_torchs_counter_of_flops_does_not_change_what_it_counts(images):
    tower = make()
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image
    lora(tower, "blocks.1.mlp.fc1")
    assert tower.macs().image == make().macs().image  # what hangs beside a layer is not counted


def doubled(module, args, output):
    return 2 * output


@torch.no_grad()
def test_copies_and_pickles_keep_their_hooks(images):
    tower = make()
    tower.blocks[1].attn.register_forward_hook(doubled)
    tower.blocks[2].register_forward_hook(doubled)
    expected = tower(images)
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(other(images), expected)
    tower.blocks[2].attn.register_forward_hook(doubled)
    assert not torch.allclose(tower(images), expected)


def prompted(seed=3, **settings):
    tower = make(**settings)
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


def test_gains_of_a_norm_that_was_replaced_are_not_left_out(images):
    tower = prompted()
    tower.blocks[1].norm1 = nn.Sequential(tower.blocks[1].norm1)
    with pytest.raises(UserError, match="one was replaced by Sequential: try"):
        tower(images)


@torch.no_grad()
def test_a_block_that_was_compiled_by_itself(images):
    expected, tower = make()(images), make()
    tower.blocks[2] = torch.compile(tower.blocks[2], backend="eager")
    torch.testing.assert_close(tower(images), expected, atol=1e-5, rtol=1e-4)
    tower.blocks[1].attn.forward = lambda x, **kwargs: x
    with pytest.raises(UserError, match="compiled by itself or got another `forward`: choose another reducer"):
        tower(images)


@torch.no_grad()
@pytest.mark.parametrize("change", ["lora", pytest.param("prune", marks=pytest.mark.slow)])
def test_towers_with_changed_layers_are_compiled_whole(change, images):
    tower = make()
    for layer in ("blocks.0.attn.qkv", "blocks.2.attn.qkv"):
        CHANGES[change](tower, layer)
    torch.compiler.reset()
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), tower(images), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_towers_with_hooked_blocks_are_compiled_in_pieces(images):
    tower = make()
    tower.blocks[0].register_forward_hook(doubled)
    torch.compiler.reset()
    compiled = torch.compile(tower, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(images), tower(images), atol=1e-5, rtol=1e-4)
