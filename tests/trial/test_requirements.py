"""What follows from a trial's settings: what is fitted, read and evaluated, and what is not."""

import pickle

import pytest

from patchrank.config import PruningConfig, TrialConfig
from patchrank.trial.check import check_trial
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import Ranker, ResolvedTrial, TrialContext
from patchrank.utils.errors import UserError

TASKS = ["digits", "digits_ink"]
MLP = Ranker("mix_mlp", {"dim": 16, "head": "linear"})


def resolved(**sections) -> ResolvedTrial:
    data = {"tasks": TASKS, "n_train": 8, "n_val": 8, "n_test": 8} | sections.pop("data", {})
    return ResolvedTrial(TrialConfig.model_validate({"data": data, **sections}))


@pytest.mark.parametrize(
    "sections, ranker, epochs",
    [
        ({}, MLP, 50),
        ({"pruning": {"keep_rate": 1.0}}, MLP, 50),  # it is fitted and measured, though nothing leaves
        ({"pruning": {"reducer": "prior"}}, Ranker("prior", {}), 0),
        ({"predictor": {"name": "prior"}}, Ranker("prior", {}), 0),
        ({"pruning": {"reducer": "guided_merge"}}, MLP, 50),
        ({"pruning": {"reducer": "tome"}}, None, 0),
        ({"pruning": {"reducer": "center"}}, None, 0),
        ({"pruning": {"reducer": "golden"}}, None, 0),
        ({"pruning": {"reducer": "nothing like that"}}, None, 0),  # which a check will refuse
    ],
)
def test_what_is_fitted_and_that_a_prior_has_no_shape(sections, ranker, epochs):
    trial = resolved(**sections)
    assert (trial.ranker, trial.fit_epochs) == (ranker, epochs) and trial.is_fitted == (ranker is not None)


@pytest.mark.parametrize(
    "sections, fit_tasks, ink, needs",
    [
        ({}, TASKS, ["digits_ink"], ["digits/train", "digits_ink/train", "digits/val", "digits_ink/val"]),
        (
            {"predictor": {"fit_on": ["digits_full"]}},
            ["digits_full"],
            ["digits_full"],
            ["digits_full/train", "digits/val", "digits_ink/val"],
        ),
        ({"pruning": {"reducer": "center"}, "predictor": {"fit_on": ["digits_full"]}}, [], [], []),
        ({"pruning": {"reducer": "golden"}, "data": {"n_test": 0}}, [], [], ["digits/val", "digits_ink/val"]),
        (
            {"pruning": {"reducer": "golden"}},
            [],
            [],
            ["digits/val", "digits/oracle", "digits_ink/val", "digits_ink/oracle"],
        ),
    ],
)
def test_what_is_fitted_on_and_scored(sections, fit_tasks, ink, needs):
    trial = resolved(**sections)
    assert list(trial.fit_tasks) == fit_tasks and list(trial.fitted_on("digits_ink")) == ink
    assert ["/".join(need) for need in trial.needs] == needs
    assert list(trial.all_tasks) == list(dict.fromkeys(TASKS + fit_tasks))


@pytest.mark.parametrize(
    "pruning, prunes",
    [
        ({"keep_rate": 1.0}, False),
        ({"keep_rate": 0.9}, True),
        ({"keep_rate": 0.9, "drop_counts": [0, 0, 0, 0]}, False),
        ({"keep_rate": 1.0, "drop_counts": [1, 0, 0, 0]}, True),
        ({"budget": 0.7}, True),
        ({"budget": 1.0, "keep_rate": 0.5}, False),
        ({"budget": 0.7, "drop_counts": [0, 0, 0, 0]}, False),
    ],
)
def test_whether_anything_leaves(pruning, prunes):
    assert resolved(pruning=pruning).prunes == prunes
    assert resolved(pruning=pruning | {"reducer": "golden"}).can_be_timed == (not prunes)


def test_prompts_and_controls():
    both = {"controls": ["random"], "seed": 3}
    assert resolved(**both).controls == ("random",) and not resolved(**both).learns
    assert resolved(**both, prompt={"mode": "none"}).controls == ("random",)
    tuned = resolved(**both, prompt={"mode": "T"})
    assert tuned.learns and not tuned.learns_visual and tuned.controls == ()
    assert resolved(prompt={"mode": "V"}).learns_visual and tuned.pruning["seed"] == 3
    assert resolved(**both, pruning={"reducer": "guided_merge"}).controls == ("random",)
    for reducer in ("center", "prior", "tome"):
        assert resolved(**both, pruning={"reducer": reducer}).controls == ()
    assert resolved(golden={"remove_at": "first"}, pruning={"locations": [2, 4]}).remove_at == 2


def test_a_ranking_fitted_on_the_other_tasks_sees_none_of_its_own():
    trial = resolved(data={"tasks": [*TASKS, "digits_full"]}, predictor={"fit_on": "others"})
    assert trial.fits_each_task and trial.all_tasks == (*TASKS, "digits_full")
    assert trial.fitted_on("digits_ink") == ("digits", "digits_full")
    assert {("digits", "train"), ("digits_ink", "train"), ("digits_full", "val")} <= set(trial.needs)
    alone = resolved(data={"tasks": ["digits"]}, predictor={"fit_on": "others"})
    with pytest.raises(UserError, match="fit_on is 'others', but 'digits' is the only task; try own, or more tasks"):
        check_trial(alone)
    check_trial(ResolvedTrial(alone.config.model_copy(update={"pruning": PruningConfig(reducer="center")})))


def test_it_travels_to_workers_and_serves_as_a_key():
    trial = resolved(prompt={"mode": "T"})
    again = pickle.loads(pickle.dumps(trial))
    assert again == trial and {trial: 1}[again] == 1 and trial != resolved()


def test_what_takes_data_is_worked_out_once():
    trial = resolved(prompt={"mode": "T", "shots": 1})
    context = TrialContext(trial, load_inputs(trial.config.model, trial.config.data), "shards")
    assert list(context.recipes) == TASKS and context.recipes["digits"].preset == "coop"
    assert context.needed_shards is context.needed_shards and context.lessons("digits") is context.lessons("digits")
    assert context.path("digits", "val").startswith("shards/") and len(context.lessons("digits_ink")) == 10
    assert context.num_steps("prompt") == 100 and context.num_steps("predictor") == 100
    assert TrialContext(resolved(), context.inputs).recipes == {}
