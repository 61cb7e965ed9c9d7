"""Spaces, plans, records and searches, without Ray: what is to be tried, in which order, and what is refused."""

import json

import optuna
import pytest
from helpers.small_sweep import plan_of, write_record, write_sweep

import patchrank.tune
from patchrank import benchmark
from patchrank.config import BenchmarkConfig, TrialConfig
from patchrank.config.canonical import canonical
from patchrank.models.clip import create_clip, macs_row
from patchrank.trial.check import counted_gmacs
from patchrank.trial.identity import speed_settings
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.speed import random_tower
from patchrank.tune.console import Failure, print_plan
from patchrank.tune.driver import is_done, run_sweep
from patchrank.tune.early_stopping import STEP, VALUE
from patchrank.tune.plan import make_plan
from patchrank.tune.search import CellSearch
from patchrank.tune.space import configure
from patchrank.tune.speed import Speeds
from patchrank.tune.sweep import load_sweep
from patchrank.utils.errors import UserError

SEARCHED = "pruning.keep_rate: {uniform: [0.2, 0.95], step: 0.05}\npruning.locations: {choice: [[4], [4, 6, 8, 10]]}"
TWO = "objectives: [{metric: val_accuracy, mode: max}, {metric: gmacs, mode: min}]"


@pytest.mark.parametrize(
    "changes",
    [
        {"pruning.keep_rate": 0.5},
        {"pruning.keep_rate": 1.0},
        {"pruning.reducer": "cls_attention", "pruning.locations": [4]},
        {"pruning.reducer": "prior", "pruning.locations": [2, 3]},
        {"predictor.name": "transformer"},
        {"predictor.dim": 64, "predictor.head": "mean"},
    ],
)
def test_gmacs_counted_beforehand_are_those_that_a_trial_reports(changes):
    trial = configure(TrialConfig(), changes)
    clip = create_clip("patchrank_clip_digits", pretrained=False)
    clip.visual = random_tower(trial)
    assert counted_gmacs(trial) == macs_row(clip)["gmacs"]


def test_what_breaks_a_bound_on_gmacs_is_never_run(tmp_path):
    bound = "constraints: [{metric: gmacs, at_most: 0.033}]"
    grid = plan_of(tmp_path, "pruning.keep_rate: {grid: [0.9, 0.7, 0.5, 0.3]}", bound)
    kept = [cell.values["pruning.keep_rate"] for cell in grid.cells]
    assert kept == [0.5, 0.3] and grid.left_out == 2
    drawn = plan_of(tmp_path, SEARCHED, bound, "{method: random, samples: 12}")
    assert drawn.size == 12 and all(counted_gmacs(drawn.trial(cell.values)) <= 0.033 for cell in drawn.cells)
    search = CellSearch(plan_of(tmp_path, SEARCHED, bound, "{method: optuna, samples: 12}"))
    asked = [search.suggest(f"t{n}")["values"] for n in range(12)]
    assert all(counted_gmacs(drawn.trial(values)) <= 0.033 for values in asked)
    with pytest.raises(UserError, match="none of 4 points of the search space keeps them"):
        plan_of(tmp_path, "pruning.keep_rate: {grid: [0.9, 0.7, 0.5, 0.3]}", bound.replace("0.033", "0.001"))


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_search_keeps_its_budget_and_learns_from_records(tmp_path, sampler):
    settings = f"{{method: optuna, sampler: {sampler}, samples: 10}}"
    plan, seen = plan_of(tmp_path, SEARCHED, TWO, settings), []
    search = CellSearch(plan)
    for n in range(4):
        values = search.suggest(f"t{n}")["values"]
        seen.append(write_record(plan, values))
        search.on_trial_complete(f"t{n}", {"val_accuracy": 90.0, "gmacs": 0.03})
    search.suggest("under way when the driver is killed")
    again = plan_of(tmp_path, SEARCHED, TWO, settings)
    assert again.missing() == 6
    resumed = CellSearch(again)
    (study,) = resumed.studies
    assert [trial.state for trial in study.trials] == [optuna.trial.TrialState.COMPLETE] * 4
    assert sorted(trial.values[1] for trial in study.trials) == sorted(row["metrics"]["gmacs"] for row in again.rows())
    for n in range(6):
        seen.append(write_record(again, resumed.suggest(f"r{n}")["values"]))
    assert len(set(seen)) == 10 and resumed.suggest("end") == CellSearch.FINISHED
    assert plan_of(tmp_path, SEARCHED, TWO, settings).missing() == 0


def test_a_setting_at_its_default_is_known_though_records_may_not_state_it(tmp_path):
    """Settings that came later than the first records stand in them only where they are not at their default."""
    space = "prompt.mode: {choice: [none, T]}\nprompt.name: {choice: [coupled]}"
    plan = plan_of(tmp_path, space, search="{method: optuna, samples: 3}")
    values = {"prompt.mode": "none", "prompt.name": "coupled"}
    config = canonical(plan.trial(values).config)
    assert "name" not in config["prompt"]
    write_record(plan, values, config=config)
    plan.refresh()
    assert [drawn for cell in plan.cells for _, drawn in plan.records_of(cell)] == [values]
    assert plan.rows()[0]["config"]["prompt"]["name"] == "coupled"


def test_samplers_are_told_by_how_much_a_bound_is_broken(tmp_path):
    bound = "constraints: [{metric: val_accuracy, at_least: 60}]"
    plan = plan_of(tmp_path, SEARCHED, f"{TWO}\n{bound}", "{method: optuna, sampler: nsga2, samples: 10}")
    for rate in (0.5, 0.7):
        write_record(plan, {"pruning.keep_rate": rate, "pruning.locations": [4]})
    plan.refresh()
    search = CellSearch(plan)
    assert sorted(round(t.constraints["val_accuracy >= 60"], 6) for t in search.studies[0].trials) == [-10.0, 10.0]
    values = search.suggest("t")["values"]
    search.on_trial_complete("t", {"val_accuracy": 55.0, "gmacs": 0.03})
    assert search.studies[0].trials[-1].constraints == {"val_accuracy >= 60": 5.0} and values


def test_what_failed_in_an_earlier_run_is_tried_first_and_in_this_run_not_again(tmp_path):
    settings = "{method: optuna, samples: 5}"
    plan = plan_of(tmp_path, SEARCHED, search=settings)
    values = {"pruning.keep_rate": 0.35, "pruning.locations": [4]}
    failed = write_record(plan, values, ".error", status="error", error="RuntimeError: x")
    plan.refresh()
    assert [each for each, _ in plan.failures()] == [values] and plan.missing() == 5
    assert CellSearch(plan).suggest("t")["values"] == values
    search = CellSearch(plan, {failed: Failure(values, "x")})
    asked = [search.suggest(f"t{n}") for n in range(5)]
    assert asked[4] == CellSearch.FINISHED and values not in [each["values"] for each in asked[:4]]
    grid = plan_of(tmp_path, "pruning.keep_rate: {grid: [0.5, 0.6]}")
    first = grid.identify(grid.trial(grid.cells[0].values))
    gone = {first: Failure(grid.cells[0].values, "x")}
    assert CellSearch(grid, gone).suggest("t")["values"] == grid.cells[1].values


def test_what_failed_and_could_not_be_recorded_counts_all_the_same(tmp_path):
    """As on a full disk: no record tells of it, and yet the search must come to an end."""
    plan = plan_of(tmp_path, SEARCHED, search="{method: optuna, samples: 3}")
    values = {"pruning.keep_rate": 0.35, "pruning.locations": [4]}
    gone = {plan.identify(plan.trial(values)): Failure(values, "disk full")}
    search = CellSearch(plan, gone)
    assert [search.suggest(f"t{n}") == CellSearch.FINISHED for n in range(3)] == [False, False, True]


def test_what_was_lost_comes_first(tmp_path):
    plan = plan_of(tmp_path, SEARCHED, search="{method: optuna, samples: 3}")
    values = {"pruning.keep_rate": 0.35, "pruning.locations": [4]}
    search = CellSearch(plan, {}, {plan.identify(plan.trial(values)): values})
    assert search.suggest("t")["values"] == values


def test_nsga2_breeds_from_records(tmp_path):
    """A generation is a quarter of the samples; what is asked after it has parents, and is not drawn at random."""
    plan = plan_of(tmp_path, SEARCHED, TWO, "{method: optuna, sampler: nsga2, samples: 40}")
    for n in range(12):
        write_record(plan, {"pruning.keep_rate": round(0.3 + 0.05 * n, 2), "pruning.locations": [4]})
    plan.refresh()
    search = CellSearch(plan)
    search.suggest("t")
    study = search.studies[0]
    sampler = study.sampler
    assert [sampler.get_trial_generation(study, trial) for trial in study.trials[:13]] == [0] * 10 + [1] * 3
    parents = sampler.get_parent_population(study, 1)
    assert len(parents) == 10 and {parent.number for parent in parents} == set(range(10))


def test_a_sampler_that_repeats_itself_does_not_end_the_search(tmp_path):
    plan = plan_of(tmp_path, SEARCHED, search="{method: optuna, samples: 40}")
    search, seen = CellSearch(plan), []
    always = {"pruning.keep_rate": 0.5, "pruning.locations": "[4]"}
    search.studies[0].sampler = optuna.samplers.PartialFixedSampler(always, optuna.samplers.RandomSampler(seed=0))
    for n in range(32):  # 16 keep rates at 2 locations: that is all there is
        seen.append(json.dumps(search.suggest(f"t{n}")["values"]))
    assert len(set(seen)) == 32 and search.suggest("end") == CellSearch.FINISHED and plan.size == 32


def test_what_is_not_timed_yet_counts_as_under_way(tmp_path):
    more = "objectives: [{metric: val_accuracy, mode: max}, {metric: ms, mode: min}]"
    search = CellSearch(plan_of(tmp_path, SEARCHED, more, "{method: optuna, samples: 9}"))
    for n in range(2):
        search.suggest(f"t{n}")
    search.on_trial_complete("t0", {"id": "0", "val_accuracy": 91.0})
    search.on_trial_complete("t1", {"failure": "RuntimeError: x"})
    states = [trial.state for trial in search.studies[0].trials]
    assert states == [optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.FAIL]


def test_conditions_hold_whatever_the_order_of_axes(tmp_path):
    space = "predictor.dim: {choice: [16, 32], when: {pruning.reducer: [predictor]}}\n"
    how = "{method: random, samples: 3}"
    plan = plan_of(tmp_path, space + "pruning.reducer: {choice: [predictor, center]}", search=how)
    drawn = [cell.values for cell in plan.cells]
    assert len(drawn) == 3 and all(("predictor.dim" in v) == (v["pruning.reducer"] == "predictor") for v in drawn)
    with pytest.raises(UserError, match="conditions .* go in a circle"):
        plan_of(tmp_path, space + "pruning.reducer: {choice: [center], when: {predictor.dim: [16]}}", search=how)
    with pytest.raises(UserError, match="when names 'pruning.reducer', which is sampled"):
        plan_of(tmp_path, space.replace("choice", "grid") + "pruning.reducer: {choice: [center]}", search=how)


def test_a_space_that_is_smaller_than_its_samples_is_done_without_ray(tmp_path, capsys):
    plan = plan_of(tmp_path, "pruning.keep_rate: {choice: [0.5, 0.6]}", search="{method: optuna, samples: 5}")
    for rate in (0.5, 0.6):
        write_record(plan, {"pruning.keep_rate": rate})
    plan.refresh()
    assert plan.missing() == 3 and is_done(plan) and plan.missing() == 0
    assert "the space gives 2 of 5 trials" in capsys.readouterr().err


def test_what_was_ended_early_is_not_begun_again_under_the_same_rules(tmp_path):
    settings = "{method: optuna, samples: 5, asha: {of: predictor, grace: 1}}"
    plan = plan_of(tmp_path, SEARCHED, search=settings, reducer="predictor")
    rules = plan.sweep.config.search.asha.model_dump()
    values = {"pruning.keep_rate": 0.35, "pruning.locations": [4]}
    reached = {STEP: 1, VALUE: 70.0}
    write_record(plan, values, ".stopped", status="stopped", asha=rules, reached=reached, metrics={})
    plan.refresh()
    assert plan.missing() == 4 and not plan.rows() and len(plan.rows("stopped")) == 1
    (past,) = CellSearch(plan).studies[0].trials
    assert past.state == optuna.trial.TrialState.PRUNED and past.intermediate_values == {1: 70.0}
    other = plan_of(tmp_path, SEARCHED, search=settings.replace("grace: 1", "grace: 2"), reducer="predictor")
    assert other.missing() == 5


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_search_of_two_objectives_goes_on_past_what_was_ended_early(tmp_path, sampler):
    """Optuna would compare such trials by one objective, and refuse to."""
    settings = f"{{method: optuna, sampler: {sampler}, samples: 14, asha: {{of: predictor, grace: 1}}}}"
    plan = plan_of(tmp_path, SEARCHED, TWO, settings, reducer="predictor")
    rules, reached = plan.sweep.config.search.asha.model_dump(), {STEP: 1, VALUE: 70.0}
    stopped = {"status": "stopped", "asha": rules, "reached": reached, "metrics": {}}
    write_record(plan, {"pruning.keep_rate": 0.35, "pruning.locations": [4]}, ".stopped", **stopped)
    for n in range(11):
        write_record(plan, {"pruning.keep_rate": round(0.4 + 0.05 * n, 2), "pruning.locations": [4]})
    plan.refresh()
    search = CellSearch(plan)
    assert [search.suggest(f"t{n}") == CellSearch.FINISHED for n in range(3)] == [False, False, True]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        ("[]", "is not of the trial that its name says"),
        ('{"schema": 1, "id": "other"}', "is not of the trial that its name says"),
        ('{"schema": 0, "id": "abc"}', "has schema 0, but this version reads 1; try another root, or --fresh"),
        ('{"schema": 1, "id": "abc"}', "holds no settings of a trial; try removing it"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tmp_path, content, message):
    plan = plan_of(tmp_path, "pruning.keep_rate: {grid: [0.5, 0.6]}")
    write_record(plan, {"pruning.keep_rate": 0.5})
    path = tmp_path / "runs/small/trials/abc.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as refused:
        plan_of(tmp_path, "pruning.keep_rate: {grid: [0.5, 0.6]}")
    assert f"record {path}" in str(refused.value) and "\n" not in str(refused.value)
    assert make_plan(plan.sweep, fresh=True).missing() == 1
    path.rename(path.with_name("abc.error.json"))  # a mere note
    assert plan_of(tmp_path, "pruning.keep_rate: {grid: [0.5, 0.6]}").missing() == 1


@pytest.mark.parametrize(
    "space, more, message",
    [
        ("pruning.keep_rat: {grid: [0.5]}", "", "did you mean 'pruning.keep_rate'"),
        ("pruning.keep_rate: {grid: []}", "", "at least 1 item"),
        ("pruning.keep_rate: {choice: []}", "", "at least 1 item"),
        ("pruning.keep_rate: {uniform: [0.9, 0.3]}", "", "bounds must rise"),
        ("predictor.dim: {int: [64, 16]}", "", "bounds must rise"),
        ("pruning.keep_rate: {grid: [0.5], when: {pruning.reduce: [center]}}", "", "which is no setting"),
        (SEARCHED, "objectives: [{metric: accuracy, mode: max}]", "objectives.0.metric is 'accuracy'"),
        (SEARCHED, "objectives: [{metric: matching_rate, mode: max}]", "no trial returns 'matching_rate'"),
        (SEARCHED, "constraints: [{metric: matching_rate, at_least: 3}]", "no trial returns 'matching_rate'"),
        ("pruning.reducer: {grid: [golden]}", "objectives: [{metric: ms, mode: min}]", "no trial returns 'ms'"),
        (SEARCHED, "constraints: [{metric: gmacs, at_most: 1, at_least: 0}]", "exactly one of at_most and at_least"),
        (SEARCHED, "imports: [no_such_module]", "module 'no_such_module' cannot be imported"),
        (SEARCHED, "time_limit: 0", "time_limit is 0"),
        (SEARCHED, "loggers: {wandb: {api_key: x}}", "loggers.wandb"),
    ],
)
def test_bad_searches_are_refused_in_one_line_before_anything_is_written(tmp_path, monkeypatch, space, more, message):
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path / "files", space, more=f"{more}\n")
    with pytest.raises(UserError, match=message) as refused:
        run_sweep("files/sweep.yaml", ["search={method: random, samples: 3}"])
    assert "\n" not in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["files"]


def test_asha_is_refused_where_nothing_could_be_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path / "files", "pruning.keep_rate: {grid: [0.5, 0.6]}")
    with pytest.raises(UserError, match="no trial of this sweep trains one"):
        run_sweep("files/sweep.yaml", ["search.asha={of: predictor}"])
    assert not (tmp_path / "runs").exists()


def test_milliseconds_belong_to_one_hardware_and_are_freed_of_what_the_machine_was_doing(tmp_path):
    plan = plan_of(tmp_path, "pruning.keep_rate: {grid: [0.5, 0.6]}", "objectives: [{metric: ms, mode: min}]")
    here, there = plan.speeds.own, plan.speeds.own | {"cpu": "another"}
    config, trials = plan.sweep.config, [plan.trial(cell.values) for cell in plan.cells]
    folder = tmp_path / "runs/small/speeds"
    folder.mkdir(parents=True)

    def measure(name: str, trial: ResolvedTrial, hardware: dict, ms: float, unpruned: float) -> None:
        figures = {"ms": ms, "ms_unpruned": unpruned, "speedup": unpruned / ms}
        record = {"id": name, "settings": speed_settings(trial), "hardware": hardware, **figures}
        record |= {"benchmark": BenchmarkConfig().model_dump(), "schema": 1, "version": benchmark.VERSION}
        (folder / f"{name}.json").write_text(json.dumps(record))

    measure("a", trials[0], here, 1.0, 2.0)
    measure("b", trials[0], there, 5.0, 10.0)
    plan.speeds.refresh()
    assert plan.speeds.of(trials[0])["ms"] == 1.0
    assert plan.speeds.lacking(trials) == trials[1:]
    measure("c", trials[1], here, 2.0, 6.0)  # three times as slow an hour
    plan.speeds.refresh()
    assert plan.speeds.lacking(trials) == []
    assert [plan.speeds.of(trial)["ms"] for trial in trials] == [4.0 / 2, 4.0 / 3]
    for cell in plan.cells:
        write_record(plan, cell.values)
    plan.refresh()
    assert [row["metrics"]["speedup"] for row in plan.rows()] == [2.0, 3.0] and not plan.untimed()
    assert plan.rows()[0]["speed"]["hardware"] == here
    anywhere = Speeds(config, on_cluster=True)  # on a cluster: whichever hardware most was measured on
    assert anywhere.of(trials[1])["speedup"] == 3.0 and anywhere.lacking(trials) == []
    more = [*trials, plan.trial({"pruning.keep_rate": 0.3})]
    assert anywhere.lacking(more) == more and plan.speeds.lacking(more) == more[2:]


def test_trials_that_are_finished_and_not_timed_are_told_apart(tmp_path):
    plan = plan_of(tmp_path, "pruning.keep_rate: {grid: [0.5, 0.6]}", "constraints: [{metric: ms, at_most: 9}]")
    for cell in plan.cells:
        write_record(plan, cell.values)
    plan.refresh()
    assert plan.missing() == 0 and len(plan.untimed()) == 2


def test_a_notebook_gets_the_rows_that_there_are(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, "pruning.keep_rate: {grid: [0.5, 0.6]}")
    identity = write_record(plan, {"pruning.keep_rate": 0.6})
    monkeypatch.chdir(tmp_path)
    found = patchrank.tune.run("sweep.yaml", dry_run=True)
    assert [row["id"] for row in found] == [identity]


def test_an_axis_that_no_trial_meets_is_told(tmp_path, capsys):
    where = [f"root={tmp_path}/runs", f"shards={tmp_path}/shards"]
    plan = make_plan(load_sweep("locations", where))
    assert plan.unmet_axes() == []
    pinned = make_plan(load_sweep("locations", [*where, "trial.seed=1"]))  # controls are for seed 0
    print_plan(pinned, [], pinned.size)
    said = capsys.readouterr().err
    assert pinned.size == 4 and "note: controls is not swept, since no point of the grid meets" in said
