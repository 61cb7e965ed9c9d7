"""Layers that people replace or reparametrise (LoRA, quantised, normalised) work while tokens leave as without."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.macs import counted
from helpers.whole_blocks import EARLY, LATE, assert_as_by_modules, by_modules, create_tiny
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from patchrank.utils.errors import UserError


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


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
        tower = create_tiny()
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
        return torch.ao.quantization.quantize_dynamic(create_tiny(drops), {nn.Linear})

    with torch.no_grad():
        tower = assert_as_by_modules(make_quantised, images, drops)
    assert not tower.cls_only and tower.macs().image > create_tiny(drops).macs().image


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_a_quantised_tower_ranks_by_its_quantised_predictor(images):
    plain = create_tiny(reducer="predictor", predictor_init="random")
    tower = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    kept = tower.forward_pruned(images).kept
    shared = [set(a) & set(b) for a, b in zip(kept.tolist(), plain.forward_pruned(images).kept.tolist())]
    assert kept.shape == (2, 32) and min(map(len, shared)) > 24
    assert tower.macs().predictor == plain.macs().predictor > 0


@torch.no_grad()
def test_an_attention_whose_class_was_patched_is_called(images, monkeypatch):
    own = timm.layers.Attention.forward
    monkeypatch.setattr(timm.layers.Attention, "forward", lambda *args, **kwargs: own(*args, **kwargs).roll(1, -1))
    assert_as_by_modules(create_tiny, images)


@torch.no_grad()
def test_gates_and_norms_of_queries_and_keys_are_read_too(images):
    assert_as_by_modules(partial(create_tiny, qk_norm=True), images)
    assert_as_by_modules(partial(create_tiny, EARLY, qk_norm=True), images, EARLY)
    assert_as_by_modules(partial(create_tiny, scale_attn_norm=True), images)

    def make_gated():
        tower = create_tiny()
        for block in tower.blocks:
            block.attn.gate = nn.Linear(32, 32)
        return tower

    assert_as_by_modules(make_gated, images)


class Packed(torch.Tensor):
    """A weight that can be multiplied with and cannot be cut into parts, as torchao's."""

    def __tensor_flatten__(self):
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], args[1].as_subclass(torch.Tensor), *args[2:])
        if function in (torch.Tensor.split, torch.Tensor.chunk):
            raise NotImplementedError("this weight is in one piece")
        return super().__torch_function__(function, types, args, kwargs or {})


@torch.no_grad()
@pytest.mark.parametrize("drops", [LATE, EARLY])
def test_weights_that_cannot_be_cut(drops, images):
    def make_packed():
        tower = create_tiny(drops)
        for block in tower.blocks:
            weight = block.attn.qkv.weight.detach()
            block.attn.qkv.register_parameter("weight", None)
            block.attn.qkv.weight = nn.Parameter(weight.as_subclass(Packed), requires_grad=False)
        return tower

    assert_as_by_modules(make_packed, images, drops)


def test_torchs_counter_of_flops_does_not_change_what_it_counts(images):
    tower = create_tiny()
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image
    lora(tower, "blocks.1.mlp.fc1")
    assert tower.macs().image == create_tiny().macs().image  # what hangs beside a layer is not counted


@pytest.mark.slow
@torch.no_grad()
def test_a_block_that_was_compiled_by_itself(images):
    expected, tower = create_tiny()(images), create_tiny()
    tower.blocks[2] = torch.compile(tower.blocks[2], backend="eager")
    torch.testing.assert_close(tower(images), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_attention_without_queries_and_keys_is_named(images):
    tower = create_tiny()
    tower.blocks[1].attn.forward = lambda x, **kwargs: x
    with pytest.raises(UserError, match="compiled by itself or got another `forward`: choose another reducer"):
        tower(images)


@torch.no_grad()
@pytest.mark.parametrize("change", ["lora", pytest.param("prune", marks=pytest.mark.slow)])
def test_towers_with_changed_layers_are_compiled_whole(change, images):
    tower = create_tiny()
    for layer in ("blocks.0.attn.qkv", "blocks.2.attn.qkv"):
        CHANGES[change](tower, layer)
    torch.compiler.reset()
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), tower(images), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("reducer", ["tome", "evit", "diffrate", "evit_drop"])
@pytest.mark.parametrize("place", ["blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"])
def test_low_rank_updates_count_where_tokens_leave_in_mid_block(reducer, place, images):
    """The same update, beside a layer and written into its weight."""
    beside, inside = (create_tiny(reducer=reducer, locations=(1, 2), drop_counts=(20, 12)) for _ in range(2))
    before = inside(images)
    lora(beside, place)
    update = beside.get_submodule(place)
    inside.get_submodule(place).weight += update.up.weight @ update.down.weight
    inside.get_submodule(place).bias += update.up.weight @ update.down.bias + update.up.bias
    torch.testing.assert_close(beside(images), inside(images), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(beside(images), before, atol=1e-4)
