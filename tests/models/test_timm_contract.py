"""What timm asks of every model, asked of every entry of ours, whole and pruned.

Towers are narrow and shallow here; their real shapes are compared with timm's in `test_entrypoints`, and run whole by
the tests that are marked slow.
"""

from __future__ import annotations

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import FeatureInfo, group_parameters

from patchrank.layers.predictors import create_predictor
from patchrank.models.pretrained import find_weights
from patchrank.utils.errors import UserError

ENTRIES = timm.list_models("patchrank_clip_*")
PUBLISHED = [name for name in ENTRIES if find_weights(name).hub_id]
NARROW = {"depth": 2, "embed_dim": 32, "num_heads": 2}
WHOLE = {"locations": (2,)}
PRUNED = {"locations": (2,), "keep_rate": 0.5, "predictor_init": "random"}
CLASSES = 42

by_pruning = pytest.mark.parametrize("pruning", [WHOLE, PRUNED], ids=["whole", "pruned"])


def create(name: str, pruning: dict = PRUNED, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**NARROW, **pruning, **kwargs})


def images_for(model: torch.nn.Module, batch: int = 1) -> torch.Tensor:
    _, *sides = resolve_model_data_config(model)["input_size"]
    return torch.randn(batch, model.in_chans, *sides, generator=torch.Generator().manual_seed(1))


def timms_own(name: str, **kwargs) -> torch.nn.Module:
    """timm's tower for the weights of an entry's default tag."""
    weights = find_weights(name)
    arch, tag = weights.hub_id.removeprefix("timm/").split(".")
    if weights.quick_gelu:
        arch = arch.replace("_clip_", "_clip_quickgelu_")
    return timm.create_model(f"{arch}.{tag}", **kwargs)


def assert_finite(*outputs: torch.Tensor) -> None:
    assert all(output.isfinite().all() for output in outputs)


@torch.no_grad()
def assert_same_bits(name: str, **kwargs) -> None:
    ours = timm.create_model(name, **kwargs).eval()
    kwargs.pop("locations", None)
    theirs = timms_own(name, **kwargs).eval()
    theirs.load_state_dict(ours.state_dict())
    images = images_for(ours)
    assert torch.equal(ours(images), theirs(images))
    assert torch.equal(ours.forward_features(images), theirs.forward_features(images))
    for mine, its in zip(ours.forward_intermediates(images)[1], theirs.forward_intermediates(images)[1]):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("name", ENTRIES)
class TestContract:
    @by_pruning
    @torch.no_grad()
    def test_forward_is_head_after_features(self, name, pruning):
        model = create(name, pruning).eval()
        images = images_for(model, batch=2)
        features, outputs = model.forward_features(images), model(images)
        assert features.shape == (2, 1 + model.num_patches, model.num_features)
        assert outputs.shape == (2, model.num_classes)
        assert_finite(features, outputs)
        torch.testing.assert_close(model.forward_head(features), outputs, atol=1e-5, rtol=1e-5)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)

    @by_pruning
    def test_every_unfrozen_parameter_has_a_gradient_also_with_checkpointing(self, name, pruning):
        model = create(name, pruning, num_classes=CLASSES)
        images, runs = images_for(model), []
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            outputs = model(images)
            outputs.mean().backward()
            learnt = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
            assert outputs.shape == (1, CLASSES)
            assert [key for key, grad in learnt.items() if grad is None] == []
            assert_finite(outputs, *learnt.values())
            runs.append((outputs, learnt))
        torch.testing.assert_close(*runs)
        assert {key for key, _ in model.named_parameters() if key not in runs[0][1]} == {
            key for key, _ in model.named_parameters() if key.startswith("pruner.")
        }

    @by_pruning
    @torch.no_grad()
    def test_head_can_be_taken_off_and_replaced(self, name, pruning):
        model = create(name, pruning).eval()
        images = images_for(model)
        embedding = find_weights(name).num_classes
        assert model.num_classes == embedding
        assert model.get_classifier() is model.head and model.head.out_features == embedding
        features = model.forward_features(images)
        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), torch.nn.Identity) and model.num_classes == 0
        assert model(images).shape == (1, model.num_features)
        assert torch.equal(model.forward_features(images), features)
        model.reset_classifier(10)
        assert model(images).shape == (1, 10)
        bare = create(name, pruning, num_classes=0, global_pool="").eval()
        assert bare(images).shape[::2] == (1, bare.num_features)

    @by_pruning
    @torch.no_grad()
    def test_intermediates_lie_on_the_full_grid(self, name, pruning):
        model = create(name, pruning).eval()
        images = images_for(model)
        info = FeatureInfo(model.feature_info, tuple(range(len(model.feature_info))))
        final, maps = model.forward_intermediates(images)
        assert len(maps) == len(info.channels()) == 2
        for found, channels, reduction in zip(maps, info.channels(), info.reduction()):
            assert found.shape == (1, channels, *(side // reduction for side in images.shape[-2:]))
        assert_finite(final, *maps)
        assert torch.equal(final, model.forward_features(images))
        model.set_grad_checkpointing()
        torch.testing.assert_close(model.forward_intermediates(images), (final, maps), atol=1e-6, rtol=1e-5)
        flat = model.forward_intermediates(images, [-1], output_fmt="NLC", intermediates_only=True)[0]
        assert torch.equal(flat, maps[-1].flatten(2).transpose(1, 2))
        out = model.forward_intermediates(images, return_prefix_tokens=True, output_dict=True)
        assert torch.equal(out["image_features"], final)
        assert [prefix.shape for prefix in out["image_intermediates_prefix"]] == [(1, 1, model.embed_dim)] * 2
        dropped = (maps[-1].abs().sum(1) == 0).sum().item()
        assert dropped == sum(model.drop_counts)

    @by_pruning
    @torch.no_grad()
    def test_features_only(self, name, pruning):
        model = create(name, pruning, features_only=True, out_indices=(0, 1)).eval()
        images = images_for(model)
        side = images.shape[-1] // model.feature_info.reduction()[0]
        assert model.feature_info.channels() == [NARROW["embed_dim"]] * 2
        assert [found.shape[1:] for found in model(images)] == [(NARROW["embed_dim"], side, side)] * 2

    @by_pruning
    @torch.no_grad()
    def test_state_dict_round_trip(self, name, pruning):
        model = create(name, pruning).eval()
        torch.manual_seed(7)
        other = timm.create_model(name, **NARROW, **pruning).eval()
        images = images_for(model)
        assert not torch.equal(other(images), model(images))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images), model(images))

    @torch.no_grad()
    def test_half_precision(self, name):
        model = create(name, embed_dim=16).eval().to(torch.bfloat16)
        outputs = model(images_for(model).to(torch.bfloat16))
        assert outputs.dtype == torch.bfloat16
        assert_finite(outputs)

    @torch.no_grad()
    def test_other_channels(self, name):
        model = create(name, in_chans=1).eval()
        images = images_for(model)
        assert images.shape[1] == 1
        assert_finite(model(images))

    def test_groups_and_weight_decay(self, name):
        model = create(name)
        groups = group_parameters(model, model.group_matcher())
        assert set().union(*groups.values()) == {key for key, _ in model.named_parameters()}
        assert any(key.startswith("blocks.1") for key in groups[2])
        assert {"cls_token", "pos_embed"} <= model.no_weight_decay()
        cfg, keys = model.pretrained_cfg, model.state_dict()
        assert cfg["architecture"] == name and f"{cfg['classifier']}.weight" in keys
        assert f"{cfg['first_conv']}.weight" in keys

    @torch.no_grad()
    def test_other_image_sizes_only_where_tokens_stay(self, name):
        side = 2 * create(name).patch_embed.patch_size[0]
        images = torch.randn(1, 3, side, side)
        assert_finite(create(name, WHOLE, img_size=side)(images))
        assert_finite(create(name, WHOLE, dynamic_img_size=True)(images))
        small = create(name, img_size=side)
        assert small.drop_counts == (2,)
        with pytest.raises(UserError, match="dynamic_img_size is on"):
            create(name, dynamic_img_size=True)
        with pytest.raises(UserError, match="dynamic_img_size is on"):
            create(name, WHOLE, dynamic_img_size=True).set_pruning(keep_rate=0.5, reducer="center")
        with pytest.raises(UserError, match="set_input_size would undo the grid"):
            create(name).set_input_size((side, side))


@pytest.mark.parametrize("name", PUBLISHED)
class TestTimmsOwn:
    def test_keep_rate_1_is_timms_entry_bit_for_bit(self, name):
        torch.manual_seed(0)
        assert_same_bits(name, **NARROW, **WHOLE)

    @pytest.mark.slow
    def test_keep_rate_1_is_timms_entry_bit_for_bit_at_full_size(self, name):
        torch.manual_seed(0)
        assert_same_bits(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_full_size(name):
    torch.manual_seed(0)
    model = timm.create_model(name, keep_rate=0.5, predictor_init="random")
    images = images_for(model)
    outputs = model(images)
    outputs.mean().backward()
    assert outputs.shape == (1, find_weights(name).num_classes)
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    maps = model.eval().forward_intermediates(images, [len(model.blocks) - 1], intermediates_only=True)
    assert maps[0].shape == (1, model.embed_dim, *model.patch_embed.grid_size)
    assert_finite(outputs, *maps)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, backend",
    [
        ("patchrank_clip_digits", "eager"),
        *(pytest.param(name, "eager", marks=pytest.mark.slow) for name in ENTRIES if name != "patchrank_clip_digits"),
        pytest.param("patchrank_clip_b16", "inductor", marks=pytest.mark.slow),
        pytest.param("patchrank_clip_digits", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiles_in_one_graph(name, backend):
    model = create(name).eval()
    images = images_for(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-4)


def test_a_predictor_is_frozen_unless_it_was_handed_over():
    tower = create("patchrank_clip_digits")
    assert not any(p.requires_grad for p in tower.pruner.parameters())
    predictor = create_predictor("mix_mlp", tower.embed_dim, tower.patch_embed.grid_size)
    tower.set_pruning(predictor=predictor)
    tower.set_pruning(keep_rate=0.25)
    assert all(p.requires_grad for p in tower.pruner.reducer.predictor.parameters())


@torch.no_grad()
def test_another_image_size_resamples_positions_and_refuses_the_fitted_predictor():
    plain = timm.create_model("patchrank_clip_digits", pretrained=True)
    wide = timm.create_model("patchrank_clip_digits", pretrained=True, img_size=96)
    expected = resample_abs_pos_embed(plain.pos_embed, new_size=[12, 12], num_prefix_tokens=1)
    torch.testing.assert_close(wide.pos_embed, expected, atol=1e-3, rtol=0)  # shipped in half precision
    with pytest.raises(UserError, match=r"fitted for grid \[8, 8\], but this tower has \[12, 12\]"):
        timm.create_model("patchrank_clip_digits", pretrained=True, img_size=96, keep_rate=0.5)
    with pytest.raises(UserError, match=r"fitted for grid \[8, 8\]"):
        wide.set_pruning(keep_rate=0.5)
    wide.set_pruning(keep_rate=0.5, reducer="center")
    assert wide.forward_features(torch.zeros(1, 3, 96, 96)).shape == (1, 145, 64)


def test_patch_dropout_does_not_go_with_pruning():
    with pytest.raises(UserError, match="patch_drop_rate drops some"):
        create("patchrank_clip_digits", patch_drop_rate=0.5)
    create("patchrank_clip_digits", WHOLE, patch_drop_rate=0.5)
