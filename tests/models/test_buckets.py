"""Towers that give each image a keep rate of its own: what they compute, and how their buckets are chosen."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny_clip import create_tower
from torch import nn

from patchrank.data.dataset_factory import load_split
from patchrank.layers.pruning_block import PruningBlock
from patchrank.layers.token_state import TokenState
from patchrank.models.buckets import BucketedTower, choose_limits, fit_buckets, fit_difficulty, summary
from patchrank.utils.errors import UserError

RATES = (0.4, 0.6, 0.8)
HOW = [
    {"reducer": "predictor"},
    {"reducer": "predictor", "leftovers": "merge", "metric": "keys"},
    {"reducer": "rank_merge"},
    {"reducer": "cls_attention"},
]


@pytest.fixture
def difficulty():
    torch.manual_seed(2)
    return nn.Linear(128, 1)


@pytest.fixture
def pruned(clip):
    """The embedded tower, pruned; the next test gets it with every setting at its default."""
    clip.visual.set_pruning(keep_rate=0.6)
    yield clip.visual
    clip.visual.set_pruning(keep_rate=1.0, reducer="predictor", leftovers=None, metric="features")


@torch.inference_mode()
def bucketed(tower, difficulty, images):
    """A tower with limits that lie between the given images, so that no bucket of the four is empty."""
    tokens = tower.forward_prefix(images, tower.shared_layer)
    found = difficulty(summary(tower, tokens)).flatten().sort().values
    return BucketedTower(tower, RATES, difficulty, [(found[0] + found[1]) / 2, (found[2] + found[3]) / 2])


@pytest.mark.parametrize("how", HOW, ids=str)
def test_images_keep_their_order_and_get_what_the_fixed_tower_of_their_rate_gives(pruned, difficulty, images, how):
    pruned.set_pruning(**how)
    tower = bucketed(pruned, difficulty, images)
    with torch.inference_mode():
        embeddings, buckets = tower.forward_bucketed(images)
        assert buckets.bincount().tolist() == [1, 2, 1] and buckets.diff().abs().sum() > 0
        for image, embedding, bucket in zip(images, embeddings, buckets):
            pruned.set_pruning(keep_rate=RATES[bucket])
            assert torch.allclose(embedding, pruned(image[None])[0], atol=1e-5)


@pytest.mark.parametrize("how, bucket", list(zip(HOW, (0, 1, 2, 0))), ids=str)
def test_where_all_images_are_in_one_bucket_nothing_changes(pruned, difficulty, images, how, bucket):
    pruned.set_pruning(**how)
    limits = [-np.inf] * bucket + [np.inf] * (2 - bucket)
    tower = BucketedTower(pruned, RATES, difficulty, limits)
    pruned.set_pruning(keep_rate=RATES[bucket])
    with torch.inference_mode():
        assert torch.equal(tower(images), pruned(images))
    assert tower.macs(np.eye(3)[bucket]) == pruned.macs().image + 128


@pytest.mark.parametrize("how", HOW[:2], ids=str)
def test_no_bucket_looks_for_where_patches_have_gone(pruned, difficulty, images, how, monkeypatch):
    pruned.set_pruning(**how)
    tower = BucketedTower(pruned, RATES, difficulty, [-np.inf, np.inf])
    begin, maps = PruningBlock.begin, []

    def noting(*args):
        state = begin(*args)
        maps.append(state.homes)
        return state

    monkeypatch.setattr(PruningBlock, "begin", noting)
    monkeypatch.setattr(TokenState, "source", lambda *_: pytest.fail("a map was made"))
    with torch.inference_mode():
        tower(images)
    assert maps == [None]


def test_neighbours_change_neither_bucket_nor_embedding(pruned, difficulty, images):
    tower = bucketed(pruned, difficulty, images)
    with torch.inference_mode():
        embeddings, buckets = tower.forward_bucketed(images)
        for chosen in ([0], [3, 1], [2, 0, 3]):
            some, theirs = tower.forward_bucketed(images[chosen])
            assert torch.equal(theirs, buckets[chosen])
            assert torch.allclose(some, embeddings[chosen], rtol=1e-6, atol=1e-6 * embeddings.abs().max())


def test_all_schedules_share_the_weights_and_the_tower_stays_as_it_is(pruned, difficulty):
    before = pruned.pruning, pruned.drop_counts
    tower = BucketedTower(pruned, RATES, difficulty, [0, 1])
    own = {id(weight) for weight in difficulty.parameters()}
    assert {id(weight) for weight in tower.parameters()} == {id(weight) for weight in pruned.parameters()} | own
    assert (pruned.pruning, pruned.drop_counts) == before
    assert [sum(rest.tower.drop_counts) for rest in tower.rests] == [38, 26, 13]


def test_limits_keep_the_mean_cost_and_no_other_cuts_drift_less():
    rng = np.random.default_rng(0)
    difficulty = rng.permutation(40).astype(float)
    drift = difficulty[:, None] ** 2 * [4.0, 2.0, 1.0] + rng.random((40, 3))
    costs, most = np.array([2.0, 3.0, 4.0]), 2.9
    limits = choose_limits(difficulty, drift, costs, most)
    assert limits[0] % 1 == limits[1] % 1 == 0.5  # half way between two images

    def mean(values, low, high):
        buckets = np.digitize(difficulty, [low, high])
        return np.take_along_axis(np.broadcast_to(values, drift.shape), buckets[:, None], 1).mean()

    assert most - 1 / 40 <= mean(costs, *limits) <= most
    ways = [(low - 0.5, high - 0.5) for high in range(41) for low in range(high + 1)]
    allowed = [mean(drift, *way) for way in ways if mean(costs, *way) <= most + 1e-9]
    assert mean(drift, *limits) == pytest.approx(min(allowed)) and len(set(allowed)) > 100


def test_difficulty_is_told_of_each_image_as_if_it_had_been_left_out():
    rng = np.random.default_rng(0)
    summaries = rng.normal(size=(40, 6)) * [1, 2, 3, 4, 5, 6]
    targets = summaries @ rng.normal(size=6) + 3
    linear, told = fit_difficulty(summaries, targets + rng.normal(size=40))
    with torch.no_grad():
        found = linear(torch.tensor(summaries, dtype=torch.float32)).flatten().numpy()
    assert np.abs(found - targets).mean() < 0.6 and found.shape == told.shape
    changed = targets.copy()
    changed[7] += 50
    assert fit_difficulty(summaries, changed)[1][7] == pytest.approx(targets[7], abs=4)  # it says nothing of itself
    assert fit_difficulty(np.ones((50, 4)), np.arange(50.0))[0].weight.abs().max() == 0


def test_buckets_are_made_without_labels_and_cost_what_one_rate_would(clip, pruned):
    pruned.set_pruning(locations=(4,))
    torch.manual_seed(0)
    images = torch.rand(50, 1, 1, 1) * torch.randn(50, 3, 64, 64)  # of more and of less contrast
    split = replace(load_split("digits", "adapt", 50), tensors=images)
    tower = fit_buckets(clip, [split.first(30), split.take(range(30, 50))], [0.8, 0.6, 0.4], quiet=True)
    again = fit_buckets(clip, [replace(split, labels=None, classes=())], RATES, quiet=True)
    assert tower.keep_rates == RATES and torch.allclose(tower.limits, again.limits, atol=1e-4)
    assert torch.allclose(tower.difficulty.weight, again.difficulty.weight, atol=1e-4)
    with torch.inference_mode():
        shares = again.forward_bucketed(images)[1].bincount(minlength=3) / len(split)
    assert sum(shares > 0) > 1
    assert again.macs(shares) == pytest.approx(pruned.macs().image, rel=0.1)  # limits are for images left out


WRONG = [
    ((0.6,), {}, "buckets need 2 to 4 different keep rates, rising, but got \\(0.6,\\); try 0.4 0.6 0.8"),
    ((0.6, 0.4), {}, "different keep rates, rising, but got \\(0.6, 0.4\\)"),
    ((0.4, 1.0), {}, "a bucket's keep rate must let a patch leave, but 1.0 lets none; try 0.9"),
    ((0.4, 0.6), {"keep_rate": 1.0}, "buckets need a tower from which patches leave; try keep_rate 0.6"),
    ((0.4, 0.6), {"reducer": "golden"}, "a reducer that ranks by itself, but 'golden' is an oracle; try predictor"),
    ((0.4, 0.6, 0.8), {}, "limits must be 2 rising numbers for 3 keep rates, but are \\[0.0\\]"),
]


@pytest.mark.parametrize("rates, how, says", WRONG, ids=lambda value: str(value)[:30])
def test_what_makes_no_buckets_is_refused(pruned, difficulty, rates, how, says):
    pruned.set_pruning(**how)
    with pytest.raises(UserError, match=says):
        BucketedTower(pruned, rates, difficulty, [0.0])


def test_rates_that_cannot_have_the_mean_and_too_few_images_are_refused(clip, pruned):
    split = load_split("digits", "adapt", 50)
    with pytest.raises(UserError, match=r"keep rates \[0.4, 0.5\] cost .* on both sides of the pruning in force"):
        fit_buckets(clip, [split], [0.5, 0.4])
    with pytest.raises(UserError, match="buckets need at least 50 images to be made from, but got 49"):
        fit_buckets(clip, [split.first(49)], RATES)


@pytest.mark.skipif(not hasattr(torch.compiler.config, "recompile_limit"), reason="this torch keeps it private")
def test_compiled_buckets_may_have_more_forms_than_torch_keeps_by_itself(pruned, difficulty):
    with torch.compiler.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        BucketedTower(pruned, RATES, difficulty, [0, 1])
        assert torch.compiler.config.recompile_limit == 8
        BucketedTower(pruned, RATES, difficulty, [0, 1], compile=True)
        assert torch.compiler.config.recompile_limit >= 1024
        assert torch.compiler.config.accumulated_recompile_limit >= 1024


@pytest.mark.slow
def test_compiled_buckets_give_the_same():
    tower, images, difficulty = (
        create_tower(keep_rate=0.5, reducer="center"),
        torch.randn(4, 3, 32, 32),
        nn.Linear(128, 1),
    )
    plain = bucketed(tower, difficulty, images)
    compiled = BucketedTower(tower, RATES, difficulty, plain.limits, compile=True)
    with torch.inference_mode():
        for some in (images, images[:3]):
            assert torch.allclose(compiled(some), plain(some), atol=1e-5)
