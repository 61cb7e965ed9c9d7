"""What goes wrong in a sweep, for real: nothing finished is lost, nothing runs twice, and everything is told."""

import json
from pathlib import Path

import pytest
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from sweeping import records, rows, run, write_sweep

from patchrank.report.markdown import literal

TESTS = str(Path(__file__).parent)
BAD = ("raising", "not_a_number", "endless", "greedy")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A sweep with a trial of every kind of fault, one at a time, and what it said."""
    folder = tmp_path_factory.mktemp("faulty")
    reducers = ["center", "raising", "not_a_number", "fragile", "endless", "greedy"]
    more = "imports: [faulty]\ntime_limit: 12\nresources: {cpu: 2}"
    write_sweep(folder, f"pruning.reducer: {{grid: [{', '.join(reducers)}]}}", more=more)
    threshold = (get_used_memory() + (5 << 30)) / get_system_memory()
    environment = {"PYTHONPATH": TESTS, "FAULTY_MARKS": str(folder), "RAY_memory_usage_threshold": f"{threshold:.3f}"}
    return folder, run(folder, code=1, **environment)


def test_whatever_fails_fails_alone(faulty):
    folder, _ = faulty
    assert [row["config"]["pruning"]["reducer"] for row in rows(folder)] == ["center", "fragile"]
    assert len(records(folder)) == 2 and len(records(folder, ".error")) == len(BAD)


@pytest.mark.parametrize(
    "reducer, cause",
    [
        ("raising", "RuntimeError: no patch | is good enough"),
        ("not_a_number", "is nan, which is no result"),
        ("endless", "TimeoutError: ran longer than time_limit = 12 seconds"),
        ("greedy", "its worker was killed by Ray: the node ran out of memory"),
    ],
)
def test_every_failure_is_told_with_its_cause(faulty, reducer, cause):
    folder, said = faulty
    assert f"failed: reducer {reducer}: " in said and cause in said.split(f"failed: reducer {reducer}: ")[1]
    errors = [json.loads((folder / "runs/small/trials" / name).read_text()) for name in records(folder, ".error")]
    (mine,) = [error for error in errors if error["config"]["pruning"]["reducer"] == reducer]
    assert mine["status"] == "error" and cause in mine["error"]
    report = (folder / "runs/small/report.md").read_text()
    assert literal(cause) in report


def test_a_lost_worker_costs_no_trial(faulty):
    folder, said = faulty
    assert (folder / "fragile-was-here").exists() and "reducer fragile: is to be tried again" in said


def test_what_failed_is_tried_again_and_nothing_else(faulty):
    folder, _ = faulty
    before = records(folder)
    for name in BAD:
        (folder / f"{name}-is-mended").touch()
    said = run(folder, PYTHONPATH=TESTS, FAULTY_MARKS=str(folder))
    assert "6 trials, 2 done, 4 to run" in said
    now = records(folder)
    assert len(now) == 6 and not records(folder, ".error") and {name: now[name] for name in before} == before
