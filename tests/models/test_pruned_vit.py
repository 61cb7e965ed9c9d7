import json

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from patchrank.layers.predictors import create_predictor, save_predictor
from patchrank.layers.reducers import TokenState
from patchrank.utils.errors import UserError


@pytest.fixture
def plain(tower):
    """timm's own tower with the same weights."""
    from functools import partial

    from timm.layers import LayerNorm

    args = dict(img_size=64, patch_size=8, embed_dim=64, depth=12, num_heads=4, pre_norm=True, num_classes=64)
    model = VisionTransformer(**args, norm_layer=partial(LayerNorm, eps=1e-5)).eval()
    model.load_state_dict(tower.state_dict())
    return model


@torch.no_grad()
def test_keep_rate_1_is_timms_tower_bit_for_bit(tower, plain, images):
    assert torch.equal(tower(images), plain(images))
    assert torch.equal(tower.forward_features(images), plain.forward_features(images))
    tower.set_pruning(keep_rate=0.5, reducer="random")
    tower.set_pruning(keep_rate=1.0)
    assert torch.equal(tower(images), plain(images))


@torch.no_grad()
def test_cls_only_last_block_is_exact(tower, images):
    expected = tower(images)
    tower.set_pruning(cls_only_last=True)
    assert tower.cls_only
    torch.testing.assert_close(tower(images), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("locations", [(4, 6, 8, 10), (1, 3, 5, 7), (12,)])
def test_removing_tokens_equals_masking_their_keys(tower, images, locations):
    """The oracle: full sequences, with the keys of dropped tokens masked from their location on."""
    scores = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    tower.set_pruning(keep_rate=0.4, locations=locations, reducer="golden")
    order, alive, x = scores.argsort(descending=True, stable=True), 64, tower.embed(images)
    for layer, block in enumerate(tower.blocks, 1):
        alive -= tower.pruner.drops.get(layer, 0)
        keys = torch.zeros(4, 65, dtype=torch.bool)
        keys[:, 0] = True
        keys.scatter_(1, order[:, :alive] + 1, True)
        x = block(x, attn_mask=keys[:, None, None, :].expand(-1, 1, 65, -1))
    expected = tower.forward_head(tower.norm(x))
    torch.testing.assert_close(tower.forward_pruned(images, scores).embedding, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_kept_tokens_are_the_highest_scores(tower, images):
    scores = torch.randn(4, 64)
    tower.set_pruning(keep_rate=0.25, reducer="golden")
    out = tower.forward_pruned(images, scores)
    assert torch.equal(out.kept, scores.topk(16).indices)
    assert torch.equal(out.scores, scores)


@torch.no_grad()
def test_features_come_back_on_the_full_grid(tower, images):
    tower.set_pruning(keep_rate=0.5, reducer="random")
    features = tower.forward_features(images)
    assert features.shape == (4, 65, 64)
    assert (features[:, 1:].abs().sum(-1) == 0).sum(-1).tolist() == [32] * 4
    torch.testing.assert_close(tower.forward_head(features), tower(images), atol=1e-6, rtol=1e-6)
    maps = tower.forward_intermediates(images, [2, 3, 11], intermediates_only=True)
    assert [m.shape for m in maps] == [(4, 64, 8, 8)] * 3
    assert [(m.abs().sum(1) == 0).sum().item() for m in maps] == [0, 4 * 8, 4 * 32]
    final, _ = tower.forward_intermediates(images)
    assert torch.equal(final, features)


@torch.no_grad()
def test_random_ranking_depends_on_the_sample_alone(tower, images):
    tower.set_pruning(keep_rate=0.5, reducer="random")
    together = tower.forward_pruned(images).kept
    alone = torch.cat([tower.forward_pruned(image[None]).kept for image in images])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


@torch.no_grad()
def test_random_scores_are_uniform_enough():
    from patchrank.models.embed import random_scores

    first = random_scores(torch.randn(4000, 3, 8, 8), 64, seed=0).argmax(1)
    counts = torch.bincount(first, minlength=64).float()
    assert counts.min() > 25 and counts.max() < 110  # 62.5 expected, standard deviation 7.8


def test_registered_models_and_their_keywords():
    names = timm.list_models("patchrank_clip_*")
    assert {"patchrank_clip_b16", "patchrank_clip_digits"} <= set(names)
    model = timm.create_model("patchrank_clip_b16", drop_counts=(20, 20, 20, 20), predictor_init="random")
    assert model.drop_counts == (20, 20, 20, 20) and model.num_classes == 512
    assert type(model.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert model.pretrained_cfg["crop_pct"] == 1.0


def test_pretrained_is_offline_and_set_pruning_works_live(images):
    model = timm.create_model("patchrank_clip_digits", pretrained=True, keep_rate=0.6).eval()
    assert model.drop_counts == (7, 7, 6, 6)
    assert model.patch_embed.proj.weight.dtype == torch.float32
    model.set_pruning(keep_rate=0.5)
    assert model.forward_pruned(images).kept.shape == (4, 32)
    assert timm.models.get_model_args(model)["keep_rate"] == 0.5


def test_what_timm_notes_of_a_live_model_are_plain_values():
    model = timm.create_model("patchrank_clip_digits", reducer="center")
    model.set_pruning(keep_rate=np.float32(0.5), locations=range(4, 7))
    assert json.loads(json.dumps(timm.models.get_model_args(model)))["locations"] == [4, 5, 6]
    assert type(model.pruning.keep_rate) is float


def test_features_only_and_head_reset(images):
    model = timm.create_model("patchrank_clip_digits", features_only=True, keep_rate=0.5, reducer="random")
    assert [feature.shape[-2:] for feature in model(images)] == [(8, 8)] * 3
    model = timm.create_model("patchrank_clip_digits", keep_rate=0.5, reducer="random", num_classes=7)
    assert model(images).shape == (4, 7)
    model.reset_classifier(5, "avg")
    assert model(images).shape == (4, 5)
    with pytest.raises(UserError, match="global_pool 'max'; try 'token', 'avg'"):
        model.reset_classifier(7, "max")


def test_gradients_reach_every_parameter_of_a_pruned_tower(images):
    model = timm.create_model("patchrank_clip_digits", keep_rate=0.6, predictor_init="random")
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(images).sum().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None and not name.startswith("pruner.")]
        assert missing == []


@pytest.mark.slow
def test_compiled_shapes_are_static(tower, images):
    tower.set_pruning(keep_rate=0.5, predictor_init="random", reducer="predictor")
    exported = torch.export.export(tower, (images,))
    torch.testing.assert_close(exported.module()(images), tower(images), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep_rate": 0.5}, "no weights to rank by"),
        ({"keep_rate": 1.5}, "keep_rate is 1.5, but should be a number above 0 and at most 1"),
        ({"keep_rate": True}, "keep_rate is True, but should be a number above 0 and at most 1"),
        ({"locations": (4, "6")}, "locations.1 is '6', but should be a valid integer"),
        ({"locations": 4}, "locations is 4, but should be a valid list"),
        ({"locations": (0,)}, "from 1 to the tower's depth 12"),
        ({"locations": (13,)}, "from 1 to the tower's depth 12"),
        ({"locations": (6, 4)}, "must increase"),
        ({"reducer": "randm", "keep_rate": 0.5}, "did you mean 'random'"),
        ({"leftovers": "drp", "keep_rate": 0.5}, "did you mean 'drop'"),
        ({"keeprate": 0.5}, "did you mean 'keep_rate'"),
        ({"reducer": "randm"}, "did you mean 'random'"),
        ({"drop_counts": (0, 20, 0, 0)}, "must begin above 0"),
        ({"cls_only_last": "yes"}, "cls_only_last is 'yes', but should be a valid boolean, or should be 'auto'"),
    ],
)
def test_impossible_settings_are_refused_and_change_nothing(tower, images, settings, message):
    expected = tower(images)
    with pytest.raises(UserError, match=message):
        tower.set_pruning(**settings)
    assert torch.equal(tower(images), expected)


def test_maxima_and_masks_do_not_go_with_pruning(tower, images):
    with pytest.raises(UserError, match="class token, average or attention, but global_pool is 'max'"):
        timm.create_model("patchrank_clip_digits", global_pool="max", keep_rate=0.5, reducer="random")
    tower.set_pruning(cls_only_last=True)
    masked = tower(images, is_causal=True)
    assert not torch.allclose(masked, tower(images), atol=1e-4)  # the mask counts
    tower.set_pruning(keep_rate=0.5, reducer="random")
    with pytest.raises(UserError, match="attention masks"):
        tower(images, is_causal=True)


def test_golden_without_scores_says_so(tower, images):
    tower.set_pruning(keep_rate=0.5, reducer="golden")
    with pytest.raises(UserError, match="hand them to forward_pruned"):
        tower(images)


def write_predictor(path, tower, **changes):
    about = {"name": "mix_mlp", "kwargs": {"dim": 16}, "grid": [8, 8], "embed_dim": 64, "location": 4}
    about |= {"metric": "preservation", "model": {"name": "m", "sha256": tower.blocks_sha256()}, **changes}
    save_predictor(create_predictor("mix_mlp", about["embed_dim"], tuple(about["grid"]), dim=16), path, about)


def test_a_predictor_file_fits_or_is_refused(tower, tmp_path):
    path = tmp_path / "p.safetensors"
    write_predictor(path, tower)
    tower.set_pruning(keep_rate=0.5, predictor_path=path)
    with pytest.raises(UserError, match="fitted for location 4, but this tower has 1; try locations that begin at 4"):
        tower.set_pruning(locations=(1, 3))
    for changes, message in [
        ({"grid": [7, 7]}, r"fitted for grid \[7, 7\]"),
        ({"embed_dim": 32}, "fitted for embed_dim 32"),
        ({"model": {"name": "other", "sha256": "0" * 64}}, "fitted to other with weights 000000000000"),
    ]:
        write_predictor(path, tower, **changes)
        with pytest.raises(UserError, match=message):
            tower.set_pruning(keep_rate=0.4, predictor_path=path)
        assert tower.drop_counts == (8, 8, 8, 8)  # nothing changed
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        tower.set_pruning(keep_rate=0.5, predictor_path=path)


@pytest.mark.parametrize("settings", [{"keep_rate": 1}, {"keep_rate": 0.5, "reducer": "center"}, {}])
def test_a_predictor_file_that_is_named_is_read_even_if_nothing_ranks_by_it(tower, tmp_path, settings):
    with pytest.raises(UserError, match="predictor file .*nofile.safetensors: cannot be read"):
        tower.set_pruning(predictor_path=tmp_path / "nofile.safetensors", **settings)
    assert tower.pruning.predictor_path is None and tower.drop_counts == ()  # nothing changed
    with pytest.raises(UserError, match="prompts|predictor"):
        timm.create_model("patchrank_clip_digits", predictor_path=__file__, **settings)


def test_a_predictor_file_of_another_location_may_wait_for_it(tower, tmp_path):
    write_predictor(tmp_path / "p.safetensors", tower, location=1)
    tower.set_pruning(predictor_path=tmp_path / "p.safetensors")
    tower.set_pruning(keep_rate=0.5, locations=(1, 3))
    assert tower.drop_counts == (16, 16)


@pytest.mark.parametrize(
    "wrong, cure", [(0.5, "keep_rate=0.5"), ("p.safetensors", "predictor_path=FILE"), ({}, "pred")]
)
def test_what_is_no_predictor_is_refused(tower, wrong, cure):
    with pytest.raises(UserError, match=f"predictor must be a module .nn.Module. or None, but is .*; try {cure}"):
        tower.set_pruning(wrong)
    assert tower.drop_counts == ()


@torch.no_grad()
def test_a_predictor_that_came_as_a_module_stays(tower, images):
    torch.manual_seed(1)
    mine = create_predictor("mix_mlp", 64, (8, 8))
    tower.set_pruning(keep_rate=0.5, predictor=mine)
    tower.set_pruning(keep_rate=0.25)
    assert tower.pruner.reducer.predictor is mine
    with pytest.raises(UserError, match="no weights to rank by"):
        tower.set_pruning(locations=(5, 6))
    tower.set_pruning(keep_rate=1.0)
    assert not any(key.startswith("pruner.") for key in tower.state_dict())
    tower.set_pruning(keep_rate=0.5)
    assert tower.pruner.reducer.predictor is mine
    state = tower.state_dict()
    assert any(key.startswith("pruner.reducer.predictor.") for key in state)


def test_source_map():
    state = TokenState(tokens=torch.zeros(1, 4, 2), index=torch.arange(4)[None], cls=torch.zeros(1, 2))
    state = state.ranked_by(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).first(2)
    assert state.source(4).tolist() == [[-1, 0, 1, -1]]
