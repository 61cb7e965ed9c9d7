"""Small sweeps for tests of the driver, and ways to run them from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from patchrank.io.lock import hold
from patchrank.trial.check import counted_gmacs
from patchrank.tune import marks
from patchrank.tune.plan import Plan, make_plan
from patchrank.tune.sweep import load_sweep

# Where a driver finds `helpers.faulty_reducers`, and this very checkout where that is what the tests were told to take
TESTS = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
COMMAND = [sys.executable, "-m", "patchrank.tune"]
SWEEP = """
schema: 1
name: small
root: runs/small
shards: runs/shards
spaces: [space.yaml]
search: {{method: grid}}
trial:
  data: {{tasks: [digits], n_train: 16, n_val: 16, n_test: 16}}
  predictor: {{epochs: 2}}
  pruning: {{reducer: {reducer}, keep_rate: 0.6}}
report: {{table: small}}
{more}
"""


def write_sweep(folder: Path, space: str, reducer: str = "center", more: str = "") -> None:
    """A sweep file `sweep.yaml` with a search space of its own; trials take a fraction of a second."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(space)
    (folder / "sweep.yaml").write_text(SWEEP.format(reducer=reducer, more=more))


def plan_of(folder: Path, space: str, more: str = "", search: str = "{method: grid}", reducer: str = "center"):
    write_sweep(folder, space, reducer=reducer, more=f"{more}\n")
    overrides = [f"search={search}", f"root={folder}/runs/small", f"shards={folder}/runs/shards"]
    return make_plan(load_sweep(str(folder / "sweep.yaml"), overrides))


def write_record(plan, values: dict, kind: str = "", **changes) -> str:
    """The record that a trial with these values would leave, with made-up figures."""
    trial = plan.trial(values)
    identity, folder = plan.identify(trial), Path(plan.sweep.config.root) / "trials"
    metrics = {"val_accuracy": 100 * trial.config.pruning.keep_rate, "gmacs": counted_gmacs(trial)}
    record = {"schema": 1, "id": identity, "status": "ok", "config": trial.config.model_dump(), "metrics": metrics}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{identity}{kind}.json").write_text(json.dumps(record | changes))
    if not kind:
        (folder / f"{identity}.npz").write_bytes(b"")
    return identity


def identify(plan: Plan, rate: float) -> str:
    """The id of the trial of a keep rate."""
    return plan.identify(plan.trial({"pruning.keep_rate": rate}))


@contextmanager
def running(plan: Plan, *rates: float) -> Iterator[list[marks.Mark]]:
    """A driver that holds the sweep, and marks of trials as its workers write them."""
    root, name = plan.sweep.config.root, plan.sweep.config.name
    with hold(root, f"sweep {name}"):
        written = [marks.Mark(root, name, identify(plan, rate), {"pruning.keep_rate": rate}) for rate in rates]
        for mark in written:
            mark.write()
        yield written
        marks.clear(root, plan.record)


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Starts the sweep of a folder; what it says goes to the file `said` there."""
    with open(folder / "said", "a") as said:
        env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        return subprocess.Popen([*COMMAND, "sweep.yaml", *arguments], cwd=folder, stderr=said, env=env)


def run(folder: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """Runs the sweep of a folder to its end and returns what it said; `code` is the exit status it must have."""
    (folder / "said").write_text("")
    process = start(folder, *arguments, **environment)
    found = process.wait(timeout=400)
    said = (folder / "said").read_text()
    assert found == code, said
    assert "Traceback" not in said
    return said


def records(folder: Path, kind: str = "") -> dict[str, int]:
    """Names of records, with the time at which they were written."""
    found = (folder / "runs/small/trials").glob(f"*{kind}.json")
    return {file.name: file.stat().st_mtime_ns for file in found if kind or file.name.count(".") == 1}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs/small/results.jsonl").read_text().splitlines()]


def results(folder: Path) -> list[tuple[str, dict]]:
    """What two runs of one sweep must have alike: ids and metrics in plan order."""
    return [(row["id"], row["metrics"]) for row in rows(folder)]


def wait_for(something: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 200) -> object:
    """Waits until something is so, and returns it; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not (found := something()):
        assert process is None or process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
    return found
