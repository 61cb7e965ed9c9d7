"""One trial over several tasks: what its row and its arrays hold, and what shares what."""

from dataclasses import replace

import numpy as np
import pytest

from patchrank.config import TrialConfig
from patchrank.models.clip import create_clip
from patchrank.models.embed import embed_shared, evaluate
from patchrank.trial import check as checks
from patchrank.trial import inputs as inputs_module
from patchrank.trial.check import check_trial
from patchrank.trial.identity import fingerprint, ranker_id, trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import run_trial
from patchrank.tune.space import configure
from patchrank.tune.sweep import load_sweep
from patchrank.utils.errors import UserError

BASE = TrialConfig.model_validate(
    {
        "data": {"tasks": ["digits", "digits_ink"], "n_train": 24, "n_val": 12, "n_test": 30, "n_oracle": 10},
        "golden": {"stride": 2},
        "predictor": {"epochs": 3, "dim": 16},
        "pruning": {"locations": [4], "keep_rate": 0.6},
    }
)


@pytest.fixture(scope="module")
def inputs():
    return load_inputs(BASE.model, BASE.data)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """Runs the base trial with some settings replaced; shards are shared."""
    folder = tmp_path_factory.mktemp("trial")

    def run_one(**changes):
        trial = configure(BASE, {key.replace("__", "."): value for key, value in changes.items()})
        record = run_trial(trial, inputs, str(folder), str(folder / "shards"), "test", quiet=True)
        with np.load(folder / "trials" / f"{record['id']}.npz", allow_pickle=False) as arrays:
            return record, dict(arrays)

    return run_one


@pytest.mark.parametrize("reducer", ["center", "random", "cls_attention"])
@pytest.mark.parametrize("locations", [[1], [4], [2, 3]])
def test_tokens_shared_by_trials_give_the_same_embeddings_bit_for_bit(inputs, reducer, locations):
    clip = create_clip("patchrank_clip_digits", keep_rate=0.5, locations=locations, reducer=reducer)
    split = inputs.reference("digits", "val").split
    tokens = embed_shared(clip, split)
    plain, shared = (evaluate(clip, split, ["random"], tokens=given, quiet=True) for given in (None, tokens))
    assert np.array_equal(plain.kept, shared.kept)
    assert all(np.array_equal(plain.cosine[name], shared.cosine[name]) for name in ("pruned", "random"))


@pytest.mark.parametrize("reducer", ["predictor", "prior", "center", "random", "cls_attention", "golden"])
def test_every_reducer_fills_a_row_that_is_the_mean_of_its_tasks(run, reducer):
    record, arrays = run(pruning__reducer=reducer)
    metrics, tasks = record["metrics"], record["metrics"]["tasks"]
    assert list(tasks) == ["digits", "digits_ink"]
    for key in ("accuracy", "accuracy_unpruned", "agreement", "cosine", "val_accuracy", "val_cosine"):
        assert metrics[key] == pytest.approx(np.mean([tasks[task][key] for task in tasks]))
    each = 10 if reducer == "golden" else 30
    assert metrics["n_images"] == 2 * each and metrics["n_kept"] == 38
    for task in tasks:
        assert 100 * arrays[f"{task}.right_pruned"].mean() == pytest.approx(tasks[task]["accuracy"])
        assert len(arrays[f"{task}.ids"]) == each and len(arrays[f"{task}.val_ids"]) == 12
    fitted = reducer in ("predictor", "prior")
    assert ("matching_rate" in metrics) == fitted == ("digits.matching" in arrays)
    assert metrics["n_train"] == (24 if fitted else 0)
    assert len(record["shards"]) == (4 if fitted or reducer == "golden" else 0)


def test_a_record_tells_what_merged_where_anything_did(run, inputs):
    record, arrays = run(pruning__reducer="center", pruning__leftovers="merge", pruning__budget=0.7)
    metrics, source = record["metrics"], arrays["digits.pictures_source"]
    assert source.shape == (3, 64) and source.max() + 1 == metrics["n_kept"] < metrics["n_tokens"]
    assert 0 < metrics["gmacs_matching"] and metrics["gmacs"] <= 0.7 * metrics["gmacs_unpruned"]
    record, arrays = run(pruning__reducer="center")
    assert "gmacs_matching" not in record["metrics"] and not any(name.endswith("_source") for name in arrays)


def test_a_guided_matching_is_fitted_as_a_predictor_is(run):
    guided, _ = run(pruning__reducer="guided_merge", pruning__locations=[4, 6], controls=["random"])
    plain, _ = run()
    same = ("matching_rate", "matching_prior", "n_train", "gmacs_predictor")
    assert {key: guided["metrics"][key] for key in same} == {key: plain["metrics"][key] for key in same}
    assert guided["shards"] == plain["shards"] and "accuracy_random" in guided["metrics"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budget": 0.2}, "budget 0.2 cannot be kept: with these locations at least"),
        ({"budget": 0.3, "reducer": "tome"}, "budget 0.3 cannot be kept"),
        ({"keep_rate": 0.3, "reducer": "tome"}, "try more locations"),
        ({"reducer": "guided_merge", "leftovers": "merge"}, "merges by a rule of its own"),
        ({"reducer": "tome", "leftovers": "drop"}, "try it without `leftovers`"),
    ],
)
def test_what_cannot_leave_is_refused_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message) as error:
        configure(BASE, {f"pruning.{key}": value for key, value in changes.items()})
    assert str(error.value).startswith(f"pruning.{next(iter(changes))}=")


def test_a_budget_counts_the_predictor_that_the_trial_has():
    """Which may be far from the usual one: this one costs as much as the tower."""
    configure(BASE, {"pruning.budget": 0.7})
    with pytest.raises(UserError, match="budget 0.7 cannot be kept"):
        configure(BASE, {"pruning.budget": 0.7, "predictor.dim": 4096})


def test_prior_matches_as_the_prior_does(run):
    _, arrays = run(pruning__reducer="prior")
    assert np.array_equal(arrays["digits.matching"], arrays["digits.matching_prior"])


def test_controls_stand_beside_a_predictor(run):
    record, arrays = run(controls=["random", "reversed"])
    assert {"accuracy_random", "accuracy_reversed"} <= record["metrics"].keys()
    assert len(arrays["digits_ink.right_reversed"]) == 30


@pytest.mark.slow
def test_pooled_fitting_reads_all_its_tasks_and_is_another_trial(run, inputs):
    own, _ = run()
    pooled, _ = run(predictor__fit_on=["digits", "digits_full"])
    assert pooled["metrics"]["n_train"] == 48 and own["id"] != pooled["id"]
    trial = configure(BASE, {"predictor.fit_on": ["digits", "digits_full"]})
    assert trial.all_tasks == ("digits", "digits_ink", "digits_full")
    assert sorted(TrialContext(trial, inputs).needed_shards) == [
        ("digits", "train"),
        ("digits", "val"),
        ("digits_full", "train"),
        ("digits_ink", "val"),
    ]


def test_shared_embeddings_and_images_change_no_figure(run, inputs):
    """Sharing is for time alone: a fresh evaluation of the same tower gives the same answers and cosines."""
    _, arrays = run(pruning__reducer="cls_attention")
    clip = create_clip("patchrank_clip_digits", keep_rate=0.6, locations=(4,), reducer="cls_attention")
    fresh = evaluate(clip, inputs.split("digits_ink", "test"), quiet=True)
    assert np.array_equal(fresh.right(), arrays["digits_ink.right_pruned"])
    assert np.array_equal(fresh.cosine["pruned"], arrays["digits_ink.cosine"])


def test_oracles_see_the_first_test_images(run, inputs):
    _, few = run(pruning__reducer="golden")
    _, all_of_them = run()
    assert list(few["digits.ids"]) == list(all_of_them["digits.ids"][:10])
    assert np.array_equal(few["digits.right_unpruned"], all_of_them["digits.right_unpruned"][:10])


def test_rounds_are_scored_for_one_metric_alone(inputs):
    once, twice = (
        TrialContext(configure(BASE, {"golden.rounds": rounds}), inputs).needed_shards["digits", "train"][1].header
        for rounds in (1, 2)
    )
    assert once["metrics"] == ["label", "confidence", "preservation"] and twice["metrics"] == ["preservation"]


def test_an_id_depends_on_the_data_of_every_task(inputs):
    trials = [configure(BASE, {"predictor.fit_on": tasks}) for tasks in (["digits"], ["digits_full"])]
    one, other = (TrialContext(trial, inputs) for trial in trials)
    assert fingerprint(one) != fingerprint(other) and trial_id(one) != trial_id(other)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"golden.metric": "label"},
        {"pruning.locations": [2]},
        {"predictor.loss": "listwise"},
        {"predictor.lr": 0.02},
        {"predictor.epochs": 4},
        {"predictor.dim": 8},
        {"predictor.head": "mean"},
        {"predictor.name": "transformer"},
        {"pruning.reducer": "prior"},
    ],
)
def test_a_fitted_ranker_is_named_by_all_that_it_depends_on(changes):
    base = ResolvedTrial(BASE)
    assert ranker_id(configure(BASE, changes), ["a"]) != ranker_id(base, ["a"]) != ranker_id(base, ["a", "b"])
    assert ranker_id(configure(BASE, {"pruning.keep_rate": 0.3}), ["a"]) == ranker_id(base, ["a"])


def test_seeds_fit_different_predictors(run):
    (_, one), (_, other) = run(seed=0), run(seed=1)
    assert not np.array_equal(one["digits.matching"], other["digits.matching"])


def test_mlp_is_refused_at_location_1_alone_where_it_ranks():
    with pytest.raises(UserError, match="class token alone"):
        configure(BASE, {"predictor.name": "mlp", "pruning.locations": [1]})
    check_trial(configure(BASE, {"predictor.name": "mlp", "pruning.locations": [2]}))
    check_trial(configure(BASE, {"predictor.name": "mlp", "pruning.locations": [1], "pruning.reducer": "random"}))


# ---- trials that do not look at test


@pytest.fixture
def poisoned(monkeypatch):
    """Every way to a test image raises."""
    real = inputs_module.load_split

    def load(task, split=None, *args):
        assert split != "test", "test was looked at"
        return real(task, split, *args)

    monkeypatch.setattr(inputs_module, "load_split", load)
    checks._check_task.cache_clear()  # which may remember that a task is sound


def blind(inputs, **changes):
    """The base trial with `n_test: 0`, and what it runs on."""
    trial = configure(BASE, {"data.n_test": 0} | {key.replace("__", "."): value for key, value in changes.items()})
    return trial, replace(inputs, data=trial.config.data)


@pytest.mark.parametrize("reducer", ["predictor", "golden"])
def test_no_trial_looks_at_test_where_n_test_is_0(inputs, poisoned, tmp_path_factory, reducer):
    folder = tmp_path_factory.getbasetemp() / "blind"
    trial, own = blind(inputs, pruning__reducer=reducer)
    record = run_trial(trial, own, str(folder), str(folder / "shards"), "test", quiet=True)
    for metrics in (record["metrics"], *record["metrics"]["tasks"].values()):
        assert {"val_accuracy", "val_accuracy_unpruned", "val_agreement", "val_cosine"} <= metrics.keys()
        assert not {"accuracy", "accuracy_unpruned", "agreement", "cosine"} & metrics.keys()
        assert metrics["n_images"] == 0
    assert record["metrics"]["gmacs"] < record["metrics"]["gmacs_unpruned"] and record["metrics"]["n_val"] == 24
    with np.load(folder / "trials" / f"{record['id']}.npz", allow_pickle=False) as arrays:
        assert "digits.ids" not in arrays and len(arrays["digits.val_right_pruned"]) == 12
        assert arrays["digits_ink.pictures"].shape == (3, 64, 64, 3)
        assert arrays["digits_ink.pictures_kept"].shape == (3, 38)
    assert len(record["shards"]) == {"center": 0, "golden": 2}.get(reducer, 4)


def test_the_poison_works(inputs, poisoned):
    with pytest.raises(AssertionError, match="test was looked at"):
        blind(inputs)[1].split("digits", "test")


def test_figures_of_val_are_those_that_trials_with_test_have(inputs, run, tmp_path):
    trial, own = blind(inputs, pruning__reducer="cls_attention")
    record = run_trial(trial, own, str(tmp_path), str(tmp_path), "test", quiet=True)
    seeing, _ = run(pruning__reducer="cls_attention")
    same = {key: value for key, value in seeing["metrics"].items() if key.startswith(("val_", "gmacs"))}
    assert same.items() <= record["metrics"].items() and len(same) >= 8


def test_ids_of_trials_that_look_at_test_are_what_they_were(inputs):
    """Records of earlier runs must be found again; this id is of the version before `n_test: 0` was allowed."""
    found = trial_id(TrialContext(ResolvedTrial(BASE), inputs))
    assert found == "a8cd4de994b0e9646d016d4e82ac815a5e3581cc7db09d1d9334df5c4b611d69"
    trial, own = blind(inputs)
    assert trial_id(TrialContext(trial, own)) != found


def test_controls_need_test_images():
    with pytest.raises(UserError, match="controls are run on test images, which data.n_test 0 keeps out of sight"):
        configure(BASE, {"data.n_test": 0, "controls": ["random"]})


def test_quick_leaves_test_out_of_sight_and_pareto_has_nothing_that_cannot_run():
    assert load_sweep("sweeps/pareto.yaml", quick=True).config.trial.data.n_test == 0
    sweep = load_sweep("sweeps/pareto.yaml")
    assert [each.metric for each in sweep.config.objectives] == ["val_accuracy", "val_cosine", "gmacs", "ms"]
    assert sweep.config.trial.data.n_test == 0 and not any(rule.kind == "grid" for rule in sweep.axes.values())
    for name in sweep.axes["predictor.name"].choice:  # the widest with the first of locations
        for locations in sweep.axes["pruning.locations"].choice:
            configure(sweep.config.trial, {"predictor.name": name, "pruning.locations": locations})
