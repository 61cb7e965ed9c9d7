"""The best settings by name fit towers of any depth, and their budgets are kept."""

import argparse
import re
from pathlib import Path

import pytest
import timm
import torch

import patchrank
from patchrank.cli.config_flags import read_config
from patchrank.cli.flags import add_pruning_flags
from patchrank.config import PruningConfig
from patchrank.layers.predictors import create_predictor
from patchrank.utils.errors import UserError


@torch.no_grad()
@pytest.mark.parametrize("budget, first", [(0.75, 3), (0.47, 2)])
def test_presets_of_twelve_layers(tower, images, budget, first):
    settings = patchrank.preset("free", tower, budget)
    assert settings["locations"] == tuple(range(first, first + 5)) and settings["taper"] == 0.6
    tower.set_pruning(**settings)
    assert 0.98 * budget < tower.macs().image / tower.macs_unpruned().image <= budget
    tower.set_pruning(create_predictor("mix_mlp", 64, (8, 8)), **patchrank.preset("ranked", tower, budget))
    assert tower.pruning.reducer == "rank_merge" and tower(images).isfinite().all()


def test_a_preset_takes_the_place_of_whatever_was_set_before(tower):
    tower.set_pruning(**patchrank.preset("free", tower, 0.7))
    fresh = tower.pruning
    for other in (
        {"reducer": "diffrate", "drop_share": 0.5, "locations": (4,), "drop_counts": (20,)},
        {"reducer": "center", "leftovers": "merge", "metric": "keys", "protection": 0.1},
    ):
        tower.set_pruning(**other)
        tower.set_pruning(**patchrank.preset("free", tower, 0.7))
        assert tower.pruning == fresh


@pytest.mark.parametrize("depth", [3, 6, 24])
def test_presets_of_other_depths(depth):
    tower = timm.create_model("patchrank_clip_digits", depth=depth, locations=(1,))
    for budget in (0.8, 0.5):
        tower.set_pruning(**patchrank.preset("free", tower, max(budget, 0.8) if depth == 3 else budget))
        assert tower.macs().image <= 0.8 * tower.macs_unpruned().image
    assert len(tower.pruning.locations) == {3: 1, 6: 2, 24: 10}[depth]


def test_the_flags_in_the_docs_are_the_presets(tower):
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    lines = re.findall(r"patchrank.evaluate (--reducer \w+_merge .*) # \"(\w+)\"", page)
    assert [name for _, name in lines] == ["free", "free", "ranked"]
    for flags, name in lines:
        parser = argparse.ArgumentParser()
        add_pruning_flags(parser)
        found = read_config(parser.parse_args(flags.split()), PruningConfig)
        assert found == PruningConfig(**patchrank.preset(name, tower, found.budget))


def test_what_no_preset_is_for_is_refused(tower):
    small = timm.create_model("patchrank_clip_digits", depth=2, locations=(1,))
    with pytest.raises(UserError, match="at least 3 layers, but this one has 2"):
        patchrank.preset("free", small, 0.5)
    with pytest.raises(UserError, match="preset 'fre' does not exist; did you mean 'free'"):
        patchrank.preset("fre", tower, 0.5)
