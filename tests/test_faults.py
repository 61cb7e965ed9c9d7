"""What goes wrong in a sweep, for real: nothing finished is lost, nothing runs twice, and everything is told."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from s3_server import SECRET, s3_server
from sweeping import records, results, rows, run, start, wait_for, write_sweep

from patchrank.report.markdown import literal

TESTS = str(Path(__file__).parent)
BAD = ("raising", "not_a_number", "endless", "greedy")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A sweep with a trial of every kind of fault, one at a time, and what it said."""
    folder = tmp_path_factory.mktemp("faulty")
    reducers = ["center", "raising", "not_a_number", "fragile", "endless", "greedy"]
    more = "imports: [faulty]\ntime_limit: 8\nresources: {cpu: 2}"
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
        ("endless", "TimeoutError: ran longer than time_limit = 8 seconds"),
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


RATES = "pruning.keep_rate: {grid: [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4]}"


def said(folder: Path) -> str:
    return (folder / "said").read_text()


def test_ctrl_c_ends_trials_with_130_and_a_second_driver_is_refused_meanwhile(tmp_path):
    write_sweep(tmp_path, RATES + "\nseed: {grid: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}")
    process = start(tmp_path)
    wait_for(lambda: records(tmp_path), process)
    elsewhere = tmp_path / "elsewhere"
    write_sweep(elsewhere, RATES)
    refused = run(elsewhere, f"root={tmp_path}/runs/small", code=2)
    assert f"pid {process.pid}" in refused and str(tmp_path) in refused.splitlines()[-1]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert "running again goes on from here" in said(tmp_path) and "Traceback" not in said(tmp_path)
    assert 1 <= len(records(tmp_path)) < 120 and len(rows(tmp_path)) == len(records(tmp_path))


def test_sigterm_ends_staging_with_130_and_what_is_made_stays(tmp_path):
    write_sweep(tmp_path, RATES, reducer="prior")
    many = ["trial.data.n_train=640", "trial.golden.window=1"]
    process = start(tmp_path, *many)
    found = wait_for(lambda: list(tmp_path.glob("runs/shards/*/shard-*.json")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 130
    assert "Traceback" not in said(tmp_path) and not records(tmp_path)
    made, before = found[0], found[0].stat().st_mtime_ns
    assert "goes on from here" in said(tmp_path)
    process = start(tmp_path, *many)
    wait_for(lambda: len(list(tmp_path.glob("runs/shards/*/shard-*.json"))) > len(found) + 1, process)
    process.kill()
    process.wait()
    assert made.stat().st_mtime_ns == before


@pytest.fixture
def small_disk(tmp_path):
    """A folder that takes little, where tests may mount one, and what makes it larger."""
    disk = tmp_path / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_told_and_costs_nothing_that_is_finished(small_disk, tmp_path):
    write_sweep(tmp_path, RATES)
    process = start(tmp_path)
    assert process.wait(timeout=200) in (1, 2)
    assert "No space left on device" in said(tmp_path) and "Traceback" not in said(tmp_path)
    before = records(tmp_path)
    assert 1 <= len(before) < 12
    small_disk()
    run(tmp_path)
    now = records(tmp_path)
    assert len(now) == len(rows(tmp_path)) == 12 and {name: now[name] for name in before} == before


def test_a_sweep_on_a_store_that_fails_for_a_while_and_whose_driver_is_killed(tmp_path):
    write_sweep(tmp_path, RATES, reducer="prior")
    with s3_server() as store:
        places = [f"root={store.url}/small", f"shards={store.url}/shards"]

        def finished() -> list[str]:
            return [key for key in store.keys("small/trials") if key.endswith(".json")]

        process = start(tmp_path, *places, **store.env)
        wait_for(finished, process)
        process.kill()
        process.wait()
        time.sleep(5)  # what is under way may yet be written
        before = {key: store.read(key) for key in finished()}
        process = start(tmp_path, *places, **store.env)
        wait_for(lambda: "trials:" in said(tmp_path).split("reading sweep.yaml")[-1], process)
        store.failing_for(seconds=8)
        assert process.wait(timeout=200) == 0, said(tmp_path)
        assert len(finished()) == 12 and {key: store.read(key) for key in before} == before
        assert f"{12 - len(before)} to run" in said(tmp_path) and "Traceback" not in said(tmp_path)
        again = run(tmp_path, *places, **store.env)
        assert "12 trials, 12 done, 0 to run" in again and f"{store.url}/small/report.md" in again
        everything = [store.read(key) for key in store.keys("")]
        assert SECRET not in said(tmp_path) and not any(SECRET.encode() in content for content in everything)


@pytest.mark.slow
def test_twenty_kills_at_random_lose_and_repeat_nothing(tmp_path):
    space = RATES + "\nseed: {grid: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]}"
    write_sweep(tmp_path / "killed", space, reducer="prior")
    write_sweep(tmp_path / "quiet", space, reducer="prior")
    chance, known = random.Random(0), {}
    for _ in range(20):
        process = start(tmp_path / "killed")
        time.sleep(chance.uniform(2, 16))
        process.kill()
        process.wait()
        time.sleep(3)
        now = records(tmp_path / "killed")
        assert {name: now[name] for name in known} == known  # nothing lost, nothing written twice
        known = now
    assert f"{240 - len(known)} to run" in run(tmp_path / "killed")
    now = records(tmp_path / "killed")
    assert {name: now[name] for name in known} == known and len(now) == 240
    run(tmp_path / "quiet")
    assert results(tmp_path / "killed") == results(tmp_path / "quiet")
