"""Two Ray nodes, as `ray start` makes them; one is lost while a sweep runs."""

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.small_sweep import records, results, rows, run, start, wait_for, write_sweep

from patchrank.layers.reducers import REDUCERS, Center
from patchrank.trial.run import run_trial
from patchrank.tune.plan import make_plan
from patchrank.tune.sweep import load_sweep

RAY = str(Path(os.sys.executable).parent / "ray")
MINE = """
from patchrank.layers.reducers import register_reducer
from patchrank.layers.reducers import Center


@register_reducer("mine")
class Mine(Center):
    pass
"""
SLOW = """
import time
from patchrank.layers.reducers import register_reducer
from patchrank.layers.reducers import Center


@register_reducer("slow")
class Slow(Center):
    def reduce(self, state, k):
        time.sleep(0.2)
        return super().reduce(state, k)
"""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
SPACE = "pruning.keep_rate: {grid: [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]}\npruning.reducer: {grid: [slow, predictor]}"


def ray_start(folder: Path, *arguments: str) -> subprocess.Popen:
    """A node of one CPU, all of whose processes are one group."""
    cpus = [] if any("--num-cpus" in each for each in arguments) else ["--num-cpus=1"]
    command = [RAY, "start", *cpus, "--disable-usage-stats", "--block", *arguments]
    with open(folder / "ray", "a") as log:
        return subprocess.Popen(command, env=os.environ | QUIET, stdout=log, stderr=log, start_new_session=True)


def processes(node: subprocess.Popen) -> list[int]:
    """A node's own process and all below it."""
    children = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(status.parent.name), int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(pid)
    found = [node.pid]
    for pid in found:
        found += children.get(pid, [])
    return found


def runs_a_trial(node: subprocess.Popen) -> bool:
    """By the title that Ray gives to a worker while it is at a task."""
    titles = []
    for pid in processes(node):
        with suppress(OSError):  # one that has ended meanwhile
            titles.append(Path(f"/proc/{pid}/cmdline").read_text())
    return any(title.startswith("ray::") and ".train" in title for title in titles)


def kill(node: subprocess.Popen) -> None:
    """Ends a node as a power cut would: every process below it, at once."""
    for pid in processes(node):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def two_nodes(tmp_path):
    """An address, and the second node."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    head = ray_start(tmp_path, "--head", f"--port={port}", "--include-dashboard=false")
    wait_for(lambda: "Ray runtime started" in (tmp_path / "ray").read_text(), head)
    other = ray_start(tmp_path, f"--address={address}")
    wait_for(lambda: (tmp_path / "ray").read_text().count("Ray runtime started") == 2, other)
    yield address, other
    kill(other)
    kill(head)


def quiet_results(folder: Path) -> list[tuple[str, dict]]:
    """What the sweep of a folder comes to where nothing goes wrong and no Ray is there, one trial after the other."""
    overrides = [f"root={folder}/quiet", f"shards={folder}/quiet-shards", "imports=[]"]
    plan, threads = make_plan(load_sweep(str(folder / "sweep.yaml"), overrides)), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trials = [plan.trial(cell.values) for cell in plan.cells]
        inputs = plan.inputs(trials[0])
        where = f"{folder}/quiet", f"{folder}/quiet-shards"
        done = [run_trial(trial, inputs, *where, "quiet", quiet=True) for trial in trials]
    finally:
        torch.set_num_threads(threads)
    return [(record["id"], record["metrics"]) for record in done]


@pytest.mark.slow
def test_a_lost_node_changes_nothing(two_nodes, tmp_path, monkeypatch):
    address, other = two_nodes
    write_sweep(tmp_path, SPACE, reducer="predictor", more="imports: [my_reducers]")
    (tmp_path / "my_reducers.py").write_text(SLOW)  # so that both nodes are at work before all trials are done
    process = start(tmp_path, "--address", address, **QUIET)
    wait_for(lambda: runs_a_trial(other), process)
    kill(other)
    assert len(records(tmp_path)) < 12
    assert process.wait(timeout=200) == 0, (tmp_path / "said").read_text()
    assert len(rows(tmp_path)) == 12 and not records(tmp_path, ".error")
    assert "is to be tried again" in (tmp_path / "said").read_text()
    monkeypatch.setitem(REDUCERS, "slow", Center)
    assert results(tmp_path) == quiet_results(tmp_path)


@pytest.mark.slow
def test_shards_that_a_lost_node_was_making_are_made_elsewhere(two_nodes, tmp_path):
    address, other = two_nodes
    write_sweep(tmp_path, "pruning.keep_rate: {grid: [0.9, 0.8]}", reducer="prior")
    process = start(tmp_path, "--address", address, "trial.data.n_train=640", "trial.golden.window=1", **QUIET)
    wait_for(lambda: list(tmp_path.glob("runs/shards/*/shard-*.json")), process)
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/shards/*/shard-*.json")}
    kill(other)
    assert len(made) < 11 and process.wait(timeout=300) == 0, (tmp_path / "said").read_text()
    assert len(list(tmp_path.glob("runs/shards/*/shard-*.json"))) == 11 and len(rows(tmp_path)) == 2
    assert all(file.stat().st_mtime_ns == written for file, written in made.items())


@pytest.mark.slow
def test_a_trial_that_no_node_holds_is_refused_after_the_wait(two_nodes, tmp_path):
    """Both nodes have one CPU; a sweep's own modules reach workers by the runtime environment."""
    address, other = two_nodes
    write_sweep(tmp_path, "pruning.keep_rate: {grid: [0.9, 0.8]}", reducer="mine", more="imports: [my_reducers]")
    (tmp_path / "my_reducers.py").write_text(MINE)
    said = run(tmp_path, "--address", address, "--wait", "3", "resources.cpu=2", code=2, **QUIET)
    assert "waiting up to 3 seconds for nodes" in said
    assert "each needs cpu 2" in said.splitlines()[-1] and said.splitlines()[-1].count("cpu 1, gpu 0") >= 1
    run(tmp_path, RAY_ADDRESS=address, **QUIET)
    assert len(rows(tmp_path)) == 2


@pytest.mark.slow
def test_a_submitted_job_runs_a_sweep_and_submitting_again_resumes(tmp_path):
    port, dashboard = free_port(), free_port()
    head = ray_start(tmp_path, "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2")
    try:
        wait_for(lambda: "Ray runtime started" in (tmp_path / "ray").read_text(), head)
        write_sweep(tmp_path, "pruning.keep_rate: {grid: [0.9, 0.8]}")
        command = [RAY, "job", "submit", f"--address=http://127.0.0.1:{dashboard}", "--", os.sys.executable]
        command += ["-m", "patchrank.tune", str(tmp_path / "sweep.yaml"), f"root={tmp_path}/runs/small"]
        command += [f"shards={tmp_path}/runs/shards"]
        for state in ("2 to run", "0 to run"):
            done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            assert state in done.stdout and "succeeded" in done.stdout
        assert len(rows(tmp_path)) == 2
        (tmp_path / "space.yaml").write_text("pruning.keep_rate: {grid: [0.9, 0.8, 0.7]}")
        assert "1 to run" in run(tmp_path, "--address", "auto", **QUIET)
    finally:
        kill(head)
