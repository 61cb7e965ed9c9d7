"""What goes wrong in a sweep, for real: nothing finished is lost, nothing runs twice, and everything is told."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.s3_server import SECRET, s3_server
from helpers.small_sweep import TESTS, records, results, rows, run, start, wait_for, write_sweep

from patchrank.report.markdown import literal
from patchrank.tune.signals import Interrupts
from patchrank.utils.errors import UserError

BAD = ("raising", "not_a_number", "endless")


def faulty_sweep(folder: Path, reducers: list[str], more: str) -> dict[str, str]:
    """A sweep over reducers that go wrong, and the environment it needs."""
    write_sweep(
        folder,
        f"pruning.reducer: {{grid: [{', '.join(reducers)}]}}",
        more=f"imports: [helpers.faulty_reducers]\n{more}",
    )
    return {"PYTHONPATH": TESTS, "FAULTY_MARKS": str(folder)}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A sweep with a trial of nearly every kind of fault, and what it said."""
    folder = tmp_path_factory.mktemp("faulty")
    environment = faulty_sweep(folder, ["center", "fragile", "endless", "raising", "not_a_number"], "time_limit: 8")
    return folder, run(folder, code=1, **environment)


@pytest.mark.slow
def test_whatever_fails_fails_alone(faulty):
    folder, _ = faulty
    assert [row["config"]["pruning"]["reducer"] for row in rows(folder)] == ["center", "fragile"]
    assert len(records(folder)) == 2 and len(records(folder, ".error")) == len(BAD)


@pytest.mark.slow
@pytest.mark.parametrize(
    "reducer, cause",
    [
        ("raising", "RuntimeError: no patch | is good enough"),
        ("not_a_number", "is nan, which is no result"),
        ("endless", "TimeoutError: ran longer than time_limit = 8 seconds"),
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


@pytest.mark.slow
def test_a_lost_worker_costs_no_trial(faulty):
    folder, said = faulty
    assert (folder / "fragile-was-here").exists() and "reducer fragile: is to be tried again" in said


@pytest.mark.slow
def test_what_failed_is_tried_again_and_nothing_else(faulty):
    folder, _ = faulty
    before = records(folder)
    for name in BAD:
        (folder / f"{name}-is-mended").touch()
    said = run(folder, PYTHONPATH=TESTS, FAULTY_MARKS=str(folder))
    assert "5 trials, 2 done, 3 to run" in said
    now = records(folder)
    assert len(now) == 5 and not records(folder, ".error") and {name: now[name] for name in before} == before


def memory() -> tuple[int, int]:
    """Bytes in use and in all, of the container where it has a limit, else of the machine: as Ray counts them."""
    fields = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    machine = {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, *_ in fields}
    used, total = machine["MemTotal"] - machine["MemAvailable"], machine["MemTotal"]
    version_2, version_1 = "memory.current memory.max", "memory/memory.usage_in_bytes memory/memory.limit_in_bytes"
    for names in (version_2, version_1):
        files = [Path("/sys/fs/cgroup") / name for name in names.split()]
        if all(file.exists() for file in files) and files[1].read_text().strip().isdecimal():
            if (bound := int(files[1].read_text())) < total:
                used, total = int(files[0].read_text()), bound
    return used, total


@pytest.mark.slow
def test_out_of_memory_ends_the_trial_that_took_it_and_not_the_sweep(tmp_path):
    """Ray's own monitor, its threshold lowered; one trial at a time, so that the greedy one is the one to blame."""
    environment = faulty_sweep(tmp_path, ["greedy", "center"], "resources: {cpu: 2}")
    used, total = memory()
    threshold = (used + (5 << 30)) / total
    said = run(tmp_path, code=1, **environment, RAY_memory_usage_threshold=f"{threshold:.3f}")
    assert said.count("reducer greedy: is to be tried again") == 2
    assert "failed: reducer greedy: its worker was killed by Ray: the node ran out of memory" in said
    assert [row["config"]["pruning"]["reducer"] for row in rows(tmp_path)] == ["center"]
    assert "ran out of memory" in (tmp_path / "runs/small/report.md").read_text()


RATES = "pruning.keep_rate: {grid: [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4]}"


def said(folder: Path) -> str:
    return (folder / "said").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_ends_trials_with_130_and_a_second_driver_is_refused_meanwhile(tmp_path, number):
    alone = f"resources: {{cpu: {os.cpu_count()}}}"  # with many workers all would be done before the other has started
    write_sweep(tmp_path, RATES + "\nseed: {grid: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}", more=alone)
    process = start(tmp_path)
    wait_for(lambda: records(tmp_path), process)
    elsewhere = tmp_path / "elsewhere"
    write_sweep(elsewhere, RATES)
    refused = run(elsewhere, f"root={tmp_path}/runs/small", code=2)
    assert f"pid {process.pid}" in refused and str(tmp_path) in refused.splitlines()[-1]
    process.send_signal(number)
    assert process.wait(timeout=120) == 130
    assert "running again goes on from here" in said(tmp_path) and "Traceback" not in said(tmp_path)
    assert 1 <= len(records(tmp_path)) < 120 and len(rows(tmp_path)) == len(records(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_staging_that_is_ended_goes_on_where_it_was(tmp_path, number):
    write_sweep(tmp_path, RATES, reducer="prior")
    many = ["trial.data.n_train=640", "trial.golden.window=1"]
    process = start(tmp_path, *many)
    wait_for(lambda: list(tmp_path.glob("runs/shards/*/shard-*.json")), process)
    process.send_signal(number)
    assert process.wait(timeout=120) == (130 if number == signal.SIGTERM else -number)
    time.sleep(5)  # what is under way may yet be written
    whole = list(tmp_path.glob("runs/shards/*/shard-*.json"))  # written last: a tar without it is made again
    made = {file: file.stat().st_mtime_ns for file in [*whole, *(each.with_suffix(".tar") for each in whole)]}
    assert "Traceback" not in said(tmp_path) and not records(tmp_path) and len(made) < 22
    run(tmp_path, *many)
    assert len(rows(tmp_path)) == 12 and {file: file.stat().st_mtime_ns for file in made} == made


def test_both_signals_reach_tune_while_it_listens_and_python_otherwise():
    heard, interrupts = [], Interrupts()
    with interrupts.caught():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        interrupts.happened = False
        os.kill(os.getpid(), signal.SIGUSR1)  # does no harm before Tune listens
        with interrupts.told_to_tune():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.signal(signal.SIGUSR1, lambda *about: heard.append(about[0]))  # as Tune does
            interrupts.check()
            interrupts.check()
            assert heard == [signal.SIGUSR1] and interrupts.happened
            with pytest.raises(KeyboardInterrupt):  # somebody is in a hurry
                os.kill(os.getpid(), signal.SIGINT)


def test_a_driver_that_has_lost_its_folder_ends_and_writes_nothing_more():
    heard, interrupts = [], Interrupts()
    interrupts.raise_if_lost()
    with interrupts.caught():
        signal.signal(signal.SIGUSR1, lambda *about: heard.append(about[0]))
        interrupts.lost.set()
        interrupts.check()
    assert heard == [signal.SIGUSR1] and interrupts.happened
    with pytest.raises(UserError, match="another driver has taken this sweep over"):
        interrupts.raise_if_lost()


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_sweep_on_a_store_that_fails_for_a_while(tmp_path):
    write_sweep(tmp_path, RATES)
    with s3_server() as store:
        places = [f"root={store.url}/small", f"shards={store.url}/shards"]
        process = start(tmp_path, *places, **store.env)
        wait_for(lambda: store.keys("small/trials"), process)
        store.failing_for(seconds=6)
        assert process.wait(timeout=200) == 0, said(tmp_path)
        again = run(tmp_path, *places, **store.env)
        assert "12 trials, 12 done, 0 to run" in again and f"{store.url}/small/report.md" in again
        everything = [store.read(key) for key in store.keys("")]
        assert SECRET not in said(tmp_path) and not any(SECRET.encode() in content for content in everything)


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_its_store_to_the_next(tmp_path):
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
        assert f"{12 - len(before)} to run" in run(tmp_path, *places, **store.env)
        assert len(finished()) == 12 and {key: store.read(key) for key in before} == before


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
