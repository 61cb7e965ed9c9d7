"""Budgets of a recipe: how they are written, and how settings are brought within milliseconds."""

import argparse

import pytest
import timm

from patchrank import benchmark
from patchrank.config import PruningConfig
from patchrank.models.clip import Clip
from patchrank.recipe.budget import GUESSES, Budget, Settler, read_budget
from patchrank.utils.errors import UserError

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, locations=(1,))
SETTING = PruningConfig(reducer="attention_merge", locations=(1, 2, 3))


@pytest.fixture
def toy():
    return Clip("toy", timm.create_model("patchrank_dinov2_s14", **SMALL), None).eval()


@pytest.fixture
def timed(monkeypatch):
    """Milliseconds are 10 for the whole tower, and in proportion to the MACs; says how often any were measured."""
    times = []

    def measure(model, *_, **__):
        tower = getattr(model, "visual", model)
        times.append(tower.macs().image / tower.macs_unpruned().image)
        return {"ms": 10 * times[-1], "ms_unpruned": 10.0, "speedup": 1 / times[-1]}

    monkeypatch.setattr(benchmark, "measure", measure)
    return times


@pytest.mark.parametrize(
    "text, budget",
    [
        ("0.6", Budget(share=0.6)),
        (" 60 % ", Budget(share=0.6)),
        ("12ms", Budget(milliseconds=12.0)),
        ("1.5 MS", Budget(milliseconds=1.5)),
    ],
)
def test_shares_and_milliseconds(text, budget):
    assert read_budget(text) == budget


@pytest.mark.parametrize("text", ["1", "0", "60", "-3ms", "0ms", "infms", "nan", "a lot", "100%", ""])
def test_what_is_no_budget_is_told(text):
    with pytest.raises(argparse.ArgumentTypeError, match="share of the MACs between 0 and 1, such as 0.6, or millisec"):
        read_budget(text)


def test_a_share_of_the_macs_is_taken_as_it_is(toy, tmp_path, timed):
    settler = Settler(toy, Budget(share=0.7), str(tmp_path))
    assert settler.settle(SETTING) == SETTING.model_copy(update={"budget": 0.7})
    assert settler.settle(PruningConfig(reducer="mlp_shift", locations=(9,))) is None  # it has no such layer
    assert not timed and not list(tmp_path.iterdir())


def test_milliseconds_become_the_largest_share_that_is_fast_enough(toy, tmp_path, timed):
    settler = Settler(toy, Budget(milliseconds=8.0), str(tmp_path))
    found = settler.settle(SETTING)
    assert 0.70 < found.budget <= 0.8
    with toy.applied(**found.model_dump()):
        macs = toy.visual.macs().image / toy.visual.macs_unpruned().image
    assert macs <= 0.8 and len(timed) <= 1 + GUESSES
    count = len(timed)
    again = Settler(toy, Budget(milliseconds=8.0), str(tmp_path))
    assert again.settle(SETTING) == found and len(timed) == count  # a second run tries the same settings


def test_a_tower_that_is_fast_enough_needs_no_recipe(toy, tmp_path, timed):
    with pytest.raises(UserError, match="--budget 11ms: the whole tower takes 10.0 ms here.*try a smaller one"):
        Settler(toy, Budget(milliseconds=11.0), str(tmp_path))


def test_what_nothing_brings_down_so_far_is_left_out(toy, tmp_path, timed):
    assert Settler(toy, Budget(milliseconds=0.5), str(tmp_path)).settle(SETTING) is None


def test_where_time_falls_less_than_macs_more_must_leave(toy, tmp_path, monkeypatch):
    def measure(model, *_, **__):
        tower = getattr(model, "visual", model)
        time = 0.4 + 0.6 * tower.macs().image / tower.macs_unpruned().image
        return {"ms": 10 * time, "ms_unpruned": 10.0, "speedup": 1 / time}

    monkeypatch.setattr(benchmark, "measure", measure)
    found = Settler(toy, Budget(milliseconds=8.5), str(tmp_path)).settle(SETTING)
    with toy.applied(**found.model_dump()):
        assert 8.0 < measure(toy)["ms"] <= 8.5


def test_times_belong_to_one_size_of_images(toy, tmp_path, timed):
    Settler(toy, Budget(milliseconds=8.0), str(tmp_path))
    larger = Clip("toy", timm.create_model("patchrank_dinov2_s14", **SMALL | {"img_size": 64}), None).eval()
    Settler(larger, Budget(milliseconds=8.0), str(tmp_path))
    assert len(timed) == 2


def test_a_time_is_within_the_budget_or_not():
    assert Budget(milliseconds=8.0).is_kept_by(8.0) and not Budget(milliseconds=8.0).is_kept_by(8.1)
    assert Budget(share=0.6).is_kept_by(1e9)
