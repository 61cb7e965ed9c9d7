"""`--stop`, without Ray: what is refused, what the driver makes of a request, and what becomes of a stopped trial."""

import json
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import ray
from helpers.small_sweep import identify, plan_of, running, write_record

from patchrank.io import list_names, read_json
from patchrank.io.lock import hold
from patchrank.tune import marks
from patchrank.tune.callback import Progress
from patchrank.tune.console import print_plan
from patchrank.tune.driver import run_sweep
from patchrank.tune.search import CellSearch
from patchrank.tune.signals import Interrupts
from patchrank.utils.errors import UserError


@pytest.mark.parametrize("rate, state", [(0.9, "done"), (0.8, "failed"), (0.5, "waiting"), (0.6, "stopped by hand")])
def test_what_does_not_run_cannot_be_ended_and_says_what_it_is(plan, command, rate, state):
    write_record(plan, {"pruning.keep_rate": 0.6}, ".stopped", status="stopped", by_hand=True, metrics={})
    with running(plan, 0.7):
        said = command("--stop", identify(plan, rate)[:10], code=2)
        assert marks.requests(plan.sweep.config.root) == set()
    assert said.splitlines()[-1].startswith(f"error: --stop {identify(plan, rate)[:10]}: ")
    assert f"(keep_rate {rate}) is {state}, and only a running trial can be ended" in said


def test_ids_that_are_unknown_or_ambiguous_are_refused_in_one_line(plan, command, monkeypatch):
    with running(plan, 0.7):
        said = command("--stop", "nobody", code=2)
        assert f"--stop nobody: no trial of this sweep has such an id; running: {identify(plan, 0.7)[:8]}" in said
        assert "no trial of this sweep has such an id" in command("--stop", "", code=2)
        real = type(plan).identify
        monkeypatch.setattr(type(plan), "identify", lambda self, trial: "ab" + real(self, trial))
        said = command("--stop", "ab", code=2)
        assert "ids begin so; give more characters of one: ab" in said and len(said.splitlines()) == 2
        assert marks.requests(plan.sweep.config.root) == set()


# ---- what the driver makes of a request


def trial_of(rate: float) -> SimpleNamespace:
    config, state = {"values": {"pruning.keep_rate": rate}}, SimpleNamespace(ray_actor=f"actor of {rate}")
    about = {"config": config, "temporary_state": state, "last_result": None, "error_file": None}
    return SimpleNamespace(trial_id=f"t{rate}", **about)


@pytest.fixture
def driver(plan, monkeypatch):
    """A driver's callback with two running trials; the list of the actors that it has ended."""
    progress, killed = Progress(plan, 4, "run-1", {}, Interrupts()), []
    monkeypatch.setattr(ray, "kill", killed.append)
    for rate in (0.7, 0.6):
        progress.on_trial_start(0, [], trial_of(rate))
        marks.Mark(plan.sweep.config.root, "small", identify(plan, rate), {"pruning.keep_rate": rate}).write()
    yield progress, killed
    progress.bar.close()


def look(progress: Progress) -> None:
    """The driver's next look at requests."""
    progress._looked_at = 0.0
    progress.on_step_end(0, [])


def test_the_driver_ends_the_trial_that_is_asked_for_and_no_other(plan, driver, command):
    progress, killed = driver
    root = plan.sweep.config.root
    with hold(root, "sweep small"):
        command("--stop", identify(plan, 0.7)[:10])
    look(progress)
    look(progress)  # its end takes a while
    assert killed == ["actor of 0.7"]
    progress.on_trial_error(0, [], trial_of(0.7))
    record = read_json(f"{root}/trials/{identify(plan, 0.7)}.stopped.json")
    assert (record["status"], record["by_hand"], record["id"]) == ("stopped", True, identify(plan, 0.7))
    assert list_names(f"{root}/running") == [f"{identify(plan, 0.6)}.json"]  # its mark and the request are gone
    assert progress.left == 3 and not progress.failures and not progress.lost
    progress.on_trial_error(0, [], trial_of(0.6))  # nobody asked for this one: its worker was lost
    assert list(progress.lost.values()) == [{"pruning.keep_rate": 0.6}] and list_names(f"{root}/running") == []


def test_a_trial_that_finishes_at_that_moment_keeps_its_record(plan, driver):
    progress, killed = driver
    marks.request_stop(plan.sweep.config.root, identify(plan, 0.7))
    look(progress)
    write_record(plan, {"pruning.keep_rate": 0.7})
    progress.on_trial_error(0, [], trial_of(0.7))
    plan.refresh()
    assert plan.record(identify(plan, 0.7))["status"] == "ok" and plan.stopped_by_hand() == []
    assert f"{identify(plan, 0.7)}.stopped.json" not in list_names(f"{plan.sweep.config.root}/trials")
    marks.clear(plan.sweep.config.root, plan.record)
    assert marks.requests(plan.sweep.config.root) == set()


def test_a_request_waits_for_a_trial_that_is_to_be_tried_again(plan, driver):
    progress, killed = driver
    marks.request_stop(plan.sweep.config.root, identify(plan, 0.5))
    look(progress)
    marks.clear(plan.sweep.config.root, plan.record)
    assert killed == [] and marks.requests(plan.sweep.config.root) == {identify(plan, 0.5)}
    progress.on_trial_start(0, [], trial_of(0.5))
    look(progress)
    assert killed == ["actor of 0.5"]


def test_a_store_that_fails_does_not_end_tune(driver, monkeypatch):
    progress, killed = driver

    def list_names(folder):
        raise UserError("cannot read")

    monkeypatch.setattr(marks, "list_names", list_names)
    look(progress)
    assert killed == []


# ---- what a stopped trial is from then on


def test_what_was_stopped_is_neither_run_again_nor_forgotten(plan, capsys):
    stopped = write_record(plan, {"pruning.keep_rate": 0.7}, ".stopped", status="stopped", by_hand=True, metrics={})
    plan.refresh()
    assert plan.missing() == 3 and [record["id"] for _, record in plan.stopped_by_hand()] == [stopped]
    assert {"pruning.keep_rate": 0.7} not in [CellSearch(plan).suggest("t")["values"] for _ in range(4)]
    print_plan(plan, [], plan.missing())
    said = capsys.readouterr().err
    assert "5 trials, 1 done, 3 to run, 1 stopped by hand" in said and "keep_rate 0.7: stopped by hand" in said
    Path(plan.sweep.config.root, f"trials/{stopped}.stopped.json").unlink()
    plan.refresh()
    assert plan.missing() == 4


def test_a_sweep_whose_rest_is_done_ends_well_and_says_what_was_stopped(tmp_path, monkeypatch, capsys):
    plan = plan_of(tmp_path, "pruning.keep_rate: {grid: [0.6]}")
    stopped = write_record(plan, {"pruning.keep_rate": 0.6}, ".stopped", status="stopped", by_hand=True, metrics={})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))
    outcome = run_sweep("sweep.yaml")
    assert outcome.exit_code == 0 and outcome.rows == []
    path = tmp_path / f"runs/small/trials/{stopped}.stopped.json"
    assert f"stopped by hand: keep_rate 0.6; to have it run, remove {path}" in capsys.readouterr().err
    report = (tmp_path / "runs/small/report.md").read_text()
    assert "Stopped by hand, and not shown: keep\\_rate 0.6." in report and "ASHA" not in report


def test_a_search_takes_no_lesson_from_what_was_stopped_and_it_counts_as_a_sample(tmp_path):
    how = "{method: optuna, samples: 3, asha: {of: predictor, grace: 1}}"
    space = "pruning.keep_rate: {uniform: [0.2, 0.95], step: 0.05}"
    plan = plan_of(tmp_path, space, search=how, reducer="predictor")
    write_record(plan, {"pruning.keep_rate": 0.35}, ".stopped", status="stopped", by_hand=True, metrics={})
    plan.refresh()
    search = CellSearch(plan)
    assert [trial.state for trial in search.studies[0].trials] == [optuna.trial.TrialState.FAIL]
    asked = [search.suggest(f"t{n}") for n in range(3)]
    assert asked[2] == CellSearch.FINISHED and {"pruning.keep_rate": 0.35} not in [each["values"] for each in asked[:2]]


def test_fresh_runs_it_again(plan):
    write_record(plan, {"pruning.keep_rate": 0.7}, ".stopped", status="stopped", by_hand=True, metrics={})
    plan.refresh()
    plan.forget()
    assert plan.missing() == 5


# ---- marks


def test_a_mark_lasts_as_long_as_its_trial_and_says_how_far_it_is_now_and_then(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(marks, "write_atomic", lambda path, content, patience: written.append(json.loads(content)))
    with marks.marked(str(tmp_path), "small", "a", {"seed": 1}) as mark:
        mark.pulse("predictor", 1, 9)
        mark.written -= marks.EVERY + 1
        mark.pulse("predictor", 2, 9)
        mark.pulse("predictor", 3, 9)
    assert [each.get("epoch") for each in written] == [None, 2]
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), marks.marked(str(tmp_path), "small", "a", {"seed": 1}):
        assert marks.marks(str(tmp_path))[0]["values"] == {"seed": 1}
        raise ZeroDivisionError
    assert marks.marks(str(tmp_path)) == []


def test_a_store_that_takes_no_mark_is_let_be():
    with marks.marked("/dev/null/nowhere", "small", "a", {}) as mark:
        mark.write()
