"""The figures that the main job stands for, on half of its test images."""

import pytest

from patchrank.config import TrialConfig
from patchrank.io.yaml import read_yaml
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.run import run_trial
from patchrank.tune.sweep import find_sweep


@pytest.fixture(
    scope="module",
    params=[
        (["digits"], 359, 64),  # one scene of every test digit
        pytest.param((["digits", "digits_full", "digits_ink"], 718, 128), marks=pytest.mark.slow),  # two scenes
    ],
    ids=lambda param: len(param[0]),
)
def metrics(request, tmp_path_factory):
    """Of one trial: by default on one task, with few golden scores; the slow case has all three tasks."""
    tasks, n_test, n_train = request.param
    folder = tmp_path_factory.mktemp("reach")
    raw = read_yaml(find_sweep("locations"))["trial"]
    raw["data"] |= {"tasks": tasks, "n_test": n_test, "n_train": n_train, "n_val": n_train // 2}
    raw["controls"] = ["random", "reversed"]  # as the sweep's first seed has them
    trial = TrialConfig.model_validate(raw)
    inputs = load_inputs(trial.model, trial.data)
    record = run_trial(ResolvedTrial(trial), inputs, str(folder), str(folder / "shards"), "reach", quiet=True)
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
