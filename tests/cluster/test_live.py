"""Looking at a sweep that runs, and ending one of its trials, from another process: on a folder and on an S3 server."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers.s3_server import s3_server
from helpers.small_sweep import COMMAND, TESTS, records, rows, run, start, wait_for, write_sweep

from patchrank.io import list_names, read_text


@pytest.fixture(params=["folder", "s3"])
def places(request, tmp_path):
    """Overrides that say where a sweep lies, its root, and what a process needs to reach it."""
    if request.param == "folder":
        yield [], str(tmp_path / "runs/small"), {}
        return
    with s3_server() as store:
        yield [f"root={store.url}/small", f"shards={store.url}/shards"], f"{store.url}/small", store.env


def look(folder: Path, *arguments: str, **environment: str) -> str:
    """What the command says on stdout, from a process in which importing Ray would end it with status 7."""
    (folder / "no_ray").mkdir(exist_ok=True)
    (folder / "no_ray/ray.py").write_text("import os\nos._exit(7)\n")
    path = os.pathsep.join([str(folder / "no_ray"), environment["PYTHONPATH"]])
    done = subprocess.run(
        [*COMMAND, "sweep.yaml", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | environment | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_trial_is_seen_running_and_ended_while_the_others_finish(tmp_path, places):
    overrides, root, environment = places
    space = "pruning.reducer: {grid: [endless, center, raising, cls_attention]}"
    write_sweep(tmp_path, space, more="imports: [helpers.faulty_reducers]")
    environment = environment | {"PYTHONPATH": TESTS, "FAULTY_MARKS": str(tmp_path)}
    process = start(tmp_path, *overrides, **environment)

    def seen() -> str | None:
        said = look(tmp_path, *overrides, "--status", **environment)
        return said if "4 trials: 2 done, 1 running, 1 failed" in said else None

    said = wait_for(seen, process)
    (running,) = [line for line in said.splitlines() if line.startswith("  ") and "reducer endless; on " in line]
    assert f"driver: sweep small (pid {process.pid}, host " in said and "last sign of life" in said
    assert "reducer raising: RuntimeError: no patch | is good enough" in said and "best val_accuracy so far: " in said
    short = running.split()[0]
    asked = look(tmp_path, *overrides, "--stop", short[:6], **environment)
    assert asked.startswith(f"asked for the end of {short} (reducer endless)")
    assert process.wait(timeout=120) == 1  # since one has failed
    told = (tmp_path / "said").read_text()
    assert "reducer endless: stopped by hand after " in told and "Traceback" not in told
    assert "to be tried again" not in told and list_names(f"{root}/running") == []
    assert len(read_text(f"{root}/results.jsonl").splitlines()) == 2
    (tmp_path / "raising-is-mended").touch()
    again = run(tmp_path, *overrides, **environment)  # status 0: the rest is done
    assert "4 trials, 2 done, 1 to run, 1 stopped by hand" in again and "stopped by hand: reducer endless; to" in again
    (name,) = [name for name in list_names(f"{root}/trials") if name.endswith(".stopped.json")]
    record = json.loads(read_text(f"{root}/trials/{name}"))
    assert record["id"].startswith(short) and record["by_hand"] is True


@pytest.mark.slow
def test_a_sweep_grows_and_shrinks_for_real(tmp_path):
    write_sweep(tmp_path, "pruning.keep_rate: {grid: [0.5, 0.6]}")
    run(tmp_path)
    before = records(tmp_path)
    write_sweep(tmp_path, "pruning.keep_rate: {grid: [0.4, 0.5, 0.6]}")
    assert "3 trials, 2 done, 1 to run" in run(tmp_path)
    now = records(tmp_path)
    assert len(now) == 3 and {name: now[name] for name in before} == before
    write_sweep(tmp_path, "pruning.keep_rate: {grid: [0.4, 0.6]}")
    said = run(tmp_path)
    assert "2 trials, 2 done, 0 to run" in said and "finished trials that are not in this plan: 1" in said
    assert [row["config"]["pruning"]["keep_rate"] for row in rows(tmp_path)] == [0.4, 0.6] and records(tmp_path) == now
    assert "| 0.5 |" not in (tmp_path / "runs/small/report.md").read_text()
    assert "keep_rate 0.5" not in (tmp_path / "runs/small/optuna.log").read_text()
    write_sweep(tmp_path, "pruning.keep_rate: {grid: [0.4, 0.5, 0.6]}")
    assert "3 trials, 3 done, 0 to run" in run(tmp_path) and len(rows(tmp_path)) == 3 and records(tmp_path) == now
