"""Towers whose embedding is made of patches: pooled by average, or by attention as SigLIP's."""

import pytest
import timm
import torch
from helpers.macs import counted

from patchrank.layers.pooling import pooled
from patchrank.layers.predictors import create_predictor
from patchrank.utils.errors import UserError

SHAPES = {
    "average": dict(class_token=False, global_pool="avg", num_classes=5),
    "average, norm before": dict(class_token=False, global_pool="avg", fc_norm=False, num_classes=5),
    "average beside a class token": dict(global_pool="avg", num_classes=5),
    "average of all tokens": dict(global_pool="avg", pool_include_prefix=True, num_classes=5),
    "average with registers": dict(reg_tokens=2, class_token=False, global_pool="avg", num_classes=5),
    "attention": dict(class_token=False, global_pool="map", num_classes=0),
    "attention with registers": dict(reg_tokens=2, class_token=False, global_pool="map", num_classes=5),
}
DROPPING = dict(keep_rate=0.5, reducer="center", locations=(4,))
MERGING = dict(keep_rate=0.5, reducer="tome", locations=(3, 4))
PARTLY = dict(keep_rate=0.5, reducer="center", locations=(4,), leftovers="merge", drop_share=0.5)


@pytest.fixture(params=SHAPES.values(), ids=list(SHAPES))
def tower(request):
    torch.manual_seed(0)
    return timm.create_model("patchrank_clip_digits", depth=5, locations=(1,), **request.param).eval()


@torch.no_grad()
def by_hand(tower, x, sizes):
    """The embedding of last tokens x (B, P + K, D) of which each patch is there as often as its size says (B, K)."""
    first, found = tower.num_prefix_tokens, []
    for tokens, counts in zip(tower.norm(x), sizes.long()):
        patches = tokens[first:].repeat_interleave(counts, dim=0)
        if tower.attn_pool is not None:
            mixed = tower.attn_pool(patches[None])
        else:
            averaged = torch.cat([tokens[:first], patches]) if tower.pool_include_prefix else patches
            mixed = averaged.mean(0, keepdim=True)
        found.append(tower.head(tower.fc_norm(mixed)))
    return torch.cat(found)


@pytest.mark.parametrize("settings", [DROPPING, MERGING, PARTLY], ids=["drop", "merge", "partly"])
@torch.no_grad()
def test_a_token_counts_as_often_as_it_has_patches(tower, images, settings):
    tower.set_pruning(**settings)
    last, state = tower._encode(images)
    sizes = state.sizes_or_ones()
    assert (sizes.max() > 1) == (settings is not DROPPING)
    torch.testing.assert_close(tower(images), by_hand(tower, last, sizes), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [DROPPING, MERGING, PARTLY], ids=["drop", "merge", "partly"])
@torch.no_grad()
def test_the_head_of_features_on_the_full_grid_is_the_embedding(tower, images, settings):
    tower.set_pruning(**settings)
    features = tower.forward_features(images)
    assert features.shape[1] == tower.num_prefix_tokens + 64
    torch.testing.assert_close(tower.forward_head(features), tower(images), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_nothing_pruned_is_timms_own_tower(tower, images):
    own = timm.models.VisionTransformer.forward
    expected = own(tower, images)
    assert torch.equal(tower(images), expected)
    tower.set_pruning(**DROPPING)
    assert torch.equal(tower.forward_whole(images), expected)
    assert torch.equal(tower.forward_suffix(tower.forward_prefix(images, 3), 3), expected)


@torch.no_grad()
def test_predictors_see_the_mean_patch_where_there_is_no_class_token(tower, images):
    tower.set_pruning(keep_rate=0.5, reducer="predictor", predictor_init="random", locations=(3,))
    seen = []
    tower.predictor.register_forward_hook(lambda module, args, output: seen.append(args))
    tower(images)
    ((cls, patches),) = seen
    x = tower.forward_prefix(images, 3)
    expected = x[:, 0] if tower.has_class_token else x[:, tower.num_prefix_tokens :].mean(1)
    torch.testing.assert_close(cls, expected)
    torch.testing.assert_close(patches, x[:, tower.num_prefix_tokens :])


@pytest.mark.parametrize("shape", ["attention", "attention with registers"])
def test_macs_of_pooling_are_those_that_torch_counts(shape, images):
    tower = timm.create_model("patchrank_clip_digits", depth=5, locations=(1,), **SHAPES[shape]).eval()
    tower.requires_grad_(False)  # or the counter stumbles over views of the learned query
    assert counted(lambda: tower(images[:1])) == tower.macs_unpruned().image
    tower.set_pruning(**DROPPING)
    assert counted(lambda: tower(images[:1])) == tower.macs().image


def test_what_needs_a_class_token_is_refused_by_name(images):
    tower = timm.create_model("patchrank_clip_digits", depth=5, locations=(1,), **SHAPES["average"]).eval()
    expected = tower(images)
    for reducer in ("cls_attention", "evit", "attention_merge", "diffrate"):
        with pytest.raises(UserError, match=f"reducer '{reducer}' .*this tower has no class token; try"):
            tower.set_pruning(keep_rate=0.5, reducer=reducer, locations=(3,))
    with pytest.raises(UserError, match="class token alone, which this tower has not; try mix_mlp"):
        tower.set_pruning(predictor=create_predictor("mlp", 64, (8, 8)), keep_rate=0.5, locations=(3,))
    assert torch.equal(tower(images), expected)


def test_an_image_of_which_nothing_is_left_has_no_mean_but_sizes_of_zero_leave_patches_out():
    tower = timm.create_model("patchrank_clip_digits", depth=2, locations=(1,), **SHAPES["attention"]).eval()
    x = torch.randn(2, 64, 64)
    sizes = torch.ones(2, 64)
    sizes[:, 10:] = 0
    torch.testing.assert_close(pooled(tower, x, sizes), tower.attn_pool(x[:, :10]), atol=1e-6, rtol=1e-5)
