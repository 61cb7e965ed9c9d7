"""`--status`: what it says of a sweep, wherever that lies, and what it leaves alone."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
from helpers.s3_server import s3_server
from helpers.small_sweep import identify, plan_of, running, write_record

from patchrank.io import list_names
from patchrank.tune import marks, worker
from patchrank.tune.plan import make_plan
from patchrank.tune.sweep import load_sweep

SPACE = "pruning.keep_rate: {grid: [0.9, 0.8, 0.7, 0.6, 0.5]}"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


def test_a_status_says_what_is_done_running_failed_and_best(plan, command):
    with running(plan, 0.7, 0.6) as (first, _):
        first.written -= 10
        first.pulse("predictor", 31, 50)
        said = command("--status")
    lines = said.splitlines()
    assert lines[1] == "5 trials: 1 done, 2 running, 1 failed, 1 waiting"
    assert lines[2].startswith(f"driver: sweep small (pid {os.getpid()}, host {socket.gethostname()}, since ")
    assert "last sign of life 0 s ago" in lines[2] or "last sign of life 1 s ago" in lines[2]
    short = identify(plan, 0.7)[:8]
    (mine,) = [line for line in lines if line.startswith(f"  {short}  keep_rate 0.7; on ")]
    assert f"on {socket.gethostname()} (pid {os.getpid()})" in mine and mine.endswith("predictor epoch 31 of 50")
    assert f"  {identify(plan, 0.8)[:8]}  keep_rate 0.8: is good enough" in lines
    assert f"best val_accuracy so far: 90 by {identify(plan, 0.9)[:8]}  keep_rate 0.9" in lines
    assert lines[-1].startswith("to end one of them: python -m patchrank.tune sweep.yaml --stop ")


def test_a_status_without_a_driver_says_how_to_go_on(plan, command, tmp_path):
    lines = command("--status").splitlines()
    assert lines[1:3] == ["5 trials: 1 done, 0 running, 1 failed, 3 waiting", "driver: none"]
    assert lines[-1] == "to go on: python -m patchrank.tune sweep.yaml"
    for rate in (0.8, 0.7, 0.6, 0.5):
        write_record(plan, {"pruning.keep_rate": rate})
    assert command("--status").splitlines()[-1] == "nothing is left to run"


def test_a_status_writes_nothing_and_takes_no_lock(plan, command, tmp_path):
    before = snapshot(tmp_path)
    command("--status")
    assert snapshot(tmp_path) == before
    with running(plan, 0.7):
        before = snapshot(tmp_path)
        command("--status")
        assert {name: file for name, file in snapshot(tmp_path).items() if ".driver" not in name} == {
            name: file for name, file in before.items() if ".driver" not in name
        }


def test_marks_of_a_driver_that_was_killed_are_told_as_such(plan, command):
    root = Path(plan.sweep.config.root)
    with running(plan, 0.7):
        note = json.loads((root / ".driver.json").read_text())
        kept = [(file, file.read_bytes()) for file in (root / "running").iterdir()]
    (root / ".driver.json").write_text(json.dumps(note | {"refreshed": time.time() - 300}))
    for file, content in kept:
        file.write_bytes(content)
    lines = command("--status").splitlines()
    assert lines[1] == "5 trials: 1 done, 1 failed, 1 cut off, 2 waiting"
    assert lines[2].startswith("driver: gone: sweep small") and lines[2].endswith("last sign of life 5 min ago")
    assert "cut off when their driver ended:" in lines and lines[-1].startswith("to go on: ")
    assert "when last heard of" in [line for line in lines if identify(plan, 0.7)[:8] in line][0]
    said = command("--stop", identify(plan, 0.7), code=2)
    assert "is cut off, since its driver is gone, and only a running trial can be ended" in said
    marks.clear(str(root), plan.record)  # as the next driver does
    assert list_names(root / "running") == []


def test_of_another_hosts_clock_only_what_it_says_itself_is_told(plan, command):
    with running(plan, 0.7) as (mark,):
        there = {"host": "elsewhere", "since": "2031-01-01 00:00:00 +0000"}
        known = json.loads(Path(mark.path).read_text()) | there | {"seconds": 75.0, "written": time.time() + 1e8}
        Path(mark.path).write_text(json.dumps(known))
        said = command("--status")
    assert (
        "on elsewhere" in said and "since 2031-01-01 00:00:00 +0000 by its clock, for 75 s when last heard of" in said
    )


def test_a_search_counts_marks_of_its_own_name(tmp_path, command):
    plan = plan_of(tmp_path, SPACE.replace("grid", "choice"), search="{method: optuna, samples: 4}")
    write_record(plan, {"pruning.keep_rate": 0.9})
    how = "search={method: optuna, samples: 4}"
    with running(plan, 0.7):
        other = marks.Mark(plan.sweep.config.root, "another", "f" * 64, {"seed": 1})
        other.write()
        lines = command(how, "--status").splitlines()
    assert lines[1] == "4 trials: 1 done, 1 running, 0 failed, 2 waiting"
    assert "and 1 trials that are not in this plan" in lines


@pytest.mark.slow
def test_all_of_it_on_an_object_store_with_reads_alone(tmp_path, command):
    with s3_server() as store:
        root = f"root={store.url}/small"
        plan = plan_of(tmp_path, SPACE)
        write_record(plan, {"pruning.keep_rate": 0.9})
        for file in (tmp_path / "runs/small/trials").iterdir():
            store.write(f"small/trials/{file.name}", file.read_bytes())
        there = make_plan(load_sweep(str(tmp_path / "sweep.yaml"), [root, f"shards={tmp_path}/runs/shards"]))
        with running(there, 0.7):
            store.seen.clear()
            lines = command(root, "--status").splitlines()
            assert {method for method, path, _ in store.seen if ".driver" not in path} <= {"GET", "HEAD"}
            assert lines[1] == "5 trials: 1 done, 1 running, 0 failed, 3 waiting" and "last sign of life" in lines[2]
            command(root, "--stop", identify(plan, 0.7)[:6])
            one = f"small/running/{identify(plan, 0.7)}"
            assert store.keys("small/running") == [f"{one}.json", f"{one}.stop"]
            assert marks.requests(f"{store.url}/small") == {identify(plan, 0.7)}
        assert store.keys("small/running") == [f"{one}.stop"]  # it has not ended yet


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--status", "--fresh"], "--status starts nothing, so --fresh does not go with it"),
        (["--status", "--dry-run"], "--status starts nothing, so --dry-run does not go with it"),
        (["--stop", "ab", "--address", "auto"], "--stop starts nothing, so --address does not go with it"),
        (["--status", "--stop", "ab"], "--status starts nothing, so --stop does not go with it"),
    ],
)
def test_flags_of_runs_do_not_go_with_a_look(plan, command, arguments, message):
    assert message in command(*arguments, code=2)


def test_a_worker_marks_the_trial_that_it_runs_and_no_other(plan, monkeypatch):
    root, seen, told = plan.sweep.config.root, [], []

    def run_trial(trial, *places, pulse, **how):
        seen.extend(marks.marks(root))
        raise RuntimeError("no patch is good enough")

    monkeypatch.setattr(worker, "run_trial", run_trial)
    monkeypatch.setattr(worker.tune, "report", told.append)
    worker.run_one({"values": {"pruning.keep_rate": 0.7}}, plan.sweep.config, "run-1")
    assert [(mark["id"], mark["values"], mark["pid"]) for mark in seen] == [
        (identify(plan, 0.7), {"pruning.keep_rate": 0.7}, os.getpid())
    ]
    assert told == [{"failure": "RuntimeError: no patch is good enough"}] and marks.marks(root) == []
    worker.run_one({"values": {"pruning.keep_rate": 0.9}}, plan.sweep.config, "run-1")  # is done
    assert len(seen) == 1 and told[1]["id"] == identify(plan, 0.9)
