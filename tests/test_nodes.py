"""Two Ray nodes, as `ray start` makes them; one is lost while a sweep runs."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from sweeping import records, results, rows, start, wait_for, write_sweep

from patchrank.inputs import load_inputs
from patchrank.trial import run_trial
from patchrank.tune.plan import make_plan
from patchrank.tune.spec import load_sweep

RAY = str(Path(os.sys.executable).parent / "ray")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
SPACE = "pruning.keep_rate: {grid: [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]}\npruning.reducer: {grid: [predictor, prior]}"


def ray_start(folder: Path, *arguments: str) -> subprocess.Popen:
    """A node of one CPU, all of whose processes are one group."""
    command = [RAY, "start", "--num-cpus=1", "--disable-usage-stats", "--block", *arguments]
    with open(folder / "ray", "a") as log:
        return subprocess.Popen(command, env=os.environ | QUIET, stdout=log, stderr=log, start_new_session=True)


def kill(node: subprocess.Popen) -> None:
    """Ends a node as a power cut would: every process below it, at once."""
    children = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(status.parent.name), int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(pid)
    doomed = [node.pid]
    for pid in doomed:
        doomed += children.get(pid, [])
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    node.wait()


@pytest.fixture
def two_nodes(tmp_path):
    """An address, and the second node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
    overrides = [f"root={folder}/quiet", f"shards={folder}/quiet-shards"]
    plan, threads = make_plan(load_sweep(str(folder / "sweep.yaml"), overrides)), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trials = [plan.trial(cell.values) for cell in plan.cells]
        inputs = load_inputs(trials[0])
        where = f"{folder}/quiet", f"{folder}/quiet-shards"
        done = [run_trial(trial, inputs, *where, "quiet", quiet=True) for trial in trials]
    finally:
        torch.set_num_threads(threads)
    return [(record["id"], record["metrics"]) for record in done]


def test_a_lost_node_changes_nothing(two_nodes, tmp_path):
    address, other = two_nodes
    write_sweep(tmp_path, SPACE, reducer="predictor")
    process = start(tmp_path, "--address", address, **QUIET)
    wait_for(lambda: len(records(tmp_path)) >= 2, process)
    kill(other)
    assert len(records(tmp_path)) < 12
    assert process.wait(timeout=200) == 0, (tmp_path / "said").read_text()
    assert len(rows(tmp_path)) == 12 and not records(tmp_path, ".error")
    assert results(tmp_path) == quiet_results(tmp_path)
