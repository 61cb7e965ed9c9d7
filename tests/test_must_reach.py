"""The figures that the main job stands for, on half of its test images."""

import pytest

from patchrank.config import TrialConfig
from patchrank.inputs import load_inputs
from patchrank.plain_yaml import read_yaml
from patchrank.trial import run_trial
from patchrank.tune.spec import find_sweep


@pytest.fixture(
    scope="module",
    params=[["digits"], pytest.param(["digits", "digits_full", "digits_ink"], marks=pytest.mark.slow)],
    ids=len,
)
def metrics(request, tmp_path_factory):
    """Of one trial: on the first task by default, which takes a third of the time of all three."""
    folder = tmp_path_factory.mktemp("reach")
    raw = read_yaml(find_sweep("locations"))["trial"]
    raw["data"] |= {
        "tasks": request.param,
        "n_test": 718,
        "n_train": 128,
        "n_val": 64,
    }  # two scenes of every test digit
    trial = TrialConfig.model_validate(raw)
    record = run_trial(trial, load_inputs(trial), str(folder), str(folder / "shards"), "reach", quiet=True)
    return record["metrics"]


def test_dropping_40_percent_by_the_predictor_costs_at_most_0_3_points_on_the_mean_of_tasks(metrics):
    assert metrics["accuracy"] >= metrics["accuracy_unpruned"] - 0.3
    assert metrics["agreement"] > 95


def test_controls_lose_much_more(metrics):
    assert metrics["accuracy_random"] <= metrics["accuracy_unpruned"] - 5
    assert metrics["accuracy_reversed"] <= metrics["accuracy_unpruned"] - 20


def test_the_predictor_matches_the_golden_ranking_better_than_position_alone(metrics):
    assert metrics["matching_rate"] >= 75
    assert metrics["matching_rate"] > metrics["matching_prior"] > metrics["matching_chance"]
