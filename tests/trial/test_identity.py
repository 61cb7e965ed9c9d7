"""Content ids of trials: what enters them, and that settings which are added later leave known ids alone."""

import json

import pytest
from pydantic import Field

from patchrank.config import BenchmarkConfig, PredictorConfig, PromptConfig, Strict, TrialConfig
from patchrank.config.canonical import FIRST, canonical
from patchrank.prompt.tuning import recipe
from patchrank.trial.identity import ranker_id, speed_id, speed_settings, trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext

SMALL = {"n_train": 8, "n_val": 8, "n_test": 8}


class LaterPredictor(PredictorConfig):
    warm_up: int = 3
    stages: tuple[int, ...] = (1, 2)


class Repair(Strict):
    images: int = 512
    ridge: float = 0.1


class LaterTrial(TrialConfig):
    """The settings of a later version: one more in a section, and two more sections."""

    predictor: LaterPredictor = LaterPredictor()
    repair: Repair | None = None
    export: Repair = Field(default_factory=Repair)


class LaterPrompt(PromptConfig):
    dropout: float = 0.0


@pytest.fixture(scope="module")
def inputs():
    config = TrialConfig(data=SMALL)
    return load_inputs(config.model, config.data)


def test_a_setting_that_is_added_later_changes_ids_only_where_it_is_no_default(inputs):
    now, later = TrialConfig(data=SMALL), LaterTrial(data=SMALL)
    assert later.model_dump() != now.model_dump() and canonical(later) == canonical(now)
    changes = [{}, {"predictor": {"warm_up": 4}}, {"predictor": {"stages": (1,)}}, {"repair": {}}]
    changes += [{"repair": {"images": 9}}, {"export": {"ridge": 0.2}}]
    configs = [LaterTrial(**({"data": SMALL} | each)) for each in changes]
    ids = [trial_id(TrialContext(ResolvedTrial(config), inputs)) for config in configs]
    assert ids[0] == trial_id(TrialContext(ResolvedTrial(now), inputs)) and len(set(ids)) == len(ids)
    fitted = [ranker_id(ResolvedTrial(config), ["a"]) for config in configs]
    assert fitted[0] == ranker_id(ResolvedTrial(now), ["a"]) != fitted[1]


def test_so_it_is_for_prompts():
    filled = {"preset": "coop", "num_tokens": 4}
    now, same, other = PromptConfig(**filled), LaterPrompt(**filled), LaterPrompt(dropout=0.5, **filled)
    assert recipe(now) == recipe(same) != recipe(other)
    assert "checkpointing" not in recipe(now)[0]  # which changes time alone


def test_every_setting_of_the_first_version_enters_ids_for_ever():
    trial = TrialConfig(prompt=PromptConfig())
    plain = canonical(trial)
    assert plain.keys() == FIRST[""]
    for section, names in FIRST.items():
        assert not section or plain[section].keys() == names


def test_lists_and_tuples_are_the_same_settings():
    pruning = {"locations": [2, 4], "drop_counts": [3, 3]}
    lists, tuples = (
        TrialConfig(pruning={key: kind(value) for key, value in pruning.items()}) for kind in (list, tuple)
    )
    assert canonical(lists) == canonical(tuples)
    plain = canonical(tuples)
    assert plain == json.loads(json.dumps(plain)) and plain["pruning"]["locations"] == [2, 4]


def test_leftovers_that_nothing_was_said_of_are_drop_for_a_ranker_alone(inputs):
    def ids(**pruning):
        trial = ResolvedTrial(TrialConfig(data=SMALL, pruning={"keep_rate": 0.5} | pruning))
        return trial_id(TrialContext(trial, inputs)), speed_id(trial, {}, BenchmarkConfig())

    for reducer in ("predictor", "center"):
        silent, drop, merge = (ids(reducer=reducer, leftovers=each) for each in (None, "drop", "merge"))
        assert silent == drop and not set(drop) & set(merge)
    assert ids(align=1) == ids() and not set(ids(align=8)) & set(ids())
    assert ids(reducer="tome") != ids(reducer="tome", metric="keys")  # which it has no use for, but a trial may say


def test_what_newer_settings_change_of_milliseconds():
    """A guided matching ranks by a predictor, whose shape counts; how much it listens to it takes no time."""

    def settings(**pruning):
        return speed_settings(ResolvedTrial(TrialConfig(pruning=pruning)))

    guided = settings(reducer="guided_merge", budget=0.7)
    assert guided["predictor"] == {"name": "mix_mlp", "dim": 16, "head": "linear"}
    assert guided == settings(reducer="guided_merge", budget=0.7, protection=0.3, keep_rate=0.2)
    assert guided != settings(reducer="guided_merge", budget=0.6)
    assert guided != settings(reducer="guided_merge", budget=0.7, taper=0.5)
    assert settings(reducer="prior", keep_rate=0.5)["predictor"] is None


def test_counts_of_nothing_are_timed_as_the_whole_tower():
    counts = {"drop_counts": [0, 0, 0, 0], "keep_rate": 0.5}
    whole, none = (ResolvedTrial(TrialConfig(pruning=each)) for each in ({"keep_rate": 1.0}, counts))
    assert speed_settings(whole) == speed_settings(none) and speed_settings(whole)["predictor"] is None
    some = ResolvedTrial(TrialConfig(pruning=counts | {"drop_counts": [1, 0, 0, 0]}))
    ids = {speed_id(each, {}, BenchmarkConfig()) for each in (whole, none, some)}
    assert len(ids) == 2
