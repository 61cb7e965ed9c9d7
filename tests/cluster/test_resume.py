"""The driver, for real: Ray starts, is killed, and loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
from helpers.small_sweep import wait_for

import patchrank
from patchrank.config import Resources
from patchrank.tune.__main__ import main
from patchrank.tune.cluster import slots
from patchrank.tune.driver import run_sweep
from patchrank.tune.plan import make_plan
from patchrank.tune.search import CellSearch
from patchrank.tune.sweep import load_sweep
from patchrank.utils.errors import UserError

SMALL = ["trial.data.tasks=[digits]", "trial.prompt.mode=none"]  # a third of the work, and half of the trials
COMMAND = [sys.executable, "-m", "patchrank.tune", "sweeps/locations.yaml", "--quick", *SMALL]
METRICS = {f"accuracy{which}" for which in ("", "_unpruned", "_random", "_reversed")}
METRICS |= {"val_accuracy", "agreement", "cosine", "n_images", "tasks"}
METRICS |= {"matching_rate", "matching_prior", "matching_chance", "gmacs", "gmacs_unpruned", "gmacs_predictor"}


def run(folder: Path, *arguments: str, code: int = 0) -> str:
    """Runs the command in a folder and returns its stderr; `code` is the exit status it must have."""
    done = subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs the command in a folder, in this process, where it must start no Ray; what `run` returns."""

    def run_here(folder: Path, *arguments: str, code: int = 0) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))
        with pytest.raises(SystemExit) as ended:
            main([*COMMAND[3:], *arguments])
        assert ended.value.code == code
        return capsys.readouterr().err

    return run_here


def trials(folder: Path) -> dict[str, int]:
    """Records by name, with the time at which they were written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("runs/locations-quick/trials/*.json")}


def kill_once(folder: Path, there: Callable[[], object]) -> None:
    """Starts the command and kills its driver with -9 as soon as something is there."""
    process = subprocess.Popen(COMMAND, cwd=folder, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(there, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)  # Ray's own processes notice and end; one of them may still finish what it is at


@pytest.fixture(scope="module")
def killed_and_finished(tmp_path_factory):
    """A sweep whose driver is killed with -9 after its first record, then run again; what it left each time."""
    folder = tmp_path_factory.mktemp("sweep")
    kill_once(folder, lambda: trials(folder))
    after_kill = trials(folder)
    said = run(folder)
    return folder, after_kill, said


def test_a_killed_driver_loses_and_repeats_nothing(killed_and_finished):
    folder, after_kill, said = killed_and_finished
    assert 1 <= len(after_kill) <= 4
    now = trials(folder)
    assert len(now) == 4
    assert {name: now[name] for name in after_kill} == after_kill
    assert f"4 trials, {len(after_kill)} done, {4 - len(after_kill)} to run" in said


def test_rows_are_in_plan_order_and_in_the_agreed_schema(killed_and_finished):
    folder, _, _ = killed_and_finished
    rows = [json.loads(line) for line in (folder / "runs/locations-quick/results.jsonl").read_text().splitlines()]
    assert [row["config"]["pruning"]["locations"] for row in rows] == [
        [2, 3, 4, 5],
        [4, 5, 6, 7],
        [1, 3, 5, 7],
        [4, 6, 8, 10],
    ]
    for row in rows:
        assert row.keys() == {
            "schema",
            "id",
            "sweep",
            "status",
            "date",
            "config",
            "metrics",
            "shards",
            "env",
            "seconds",
        }
        assert METRICS <= row["metrics"].keys() and row["metrics"]["n_images"] == 48
        assert row["status"] == "ok" and row["env"]["threads"] == 1
        assert (folder / f"runs/locations-quick/trials/{row['id']}.npz").exists()
    assert len({tuple(row["shards"]) for row in rows}) == 1  # shards are shared


def test_a_second_run_imports_no_ray_and_changes_no_row(killed_and_finished, tmp_path, monkeypatch):
    """Neither Ray nor what else loads slowly; a process that imports any of it ends with status 7."""
    folder, _, _ = killed_and_finished
    results = (folder / "runs/locations-quick/results.jsonl").read_text()
    before = trials(folder)
    brings_sklearn = version("transformers").startswith("4.")  # which open_clip imports
    for name in ("ray",) if brings_sklearn else ("ray", "sklearn"):
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(patchrank.__file__).parent.parent)]))
    said = run(folder)
    assert trials(folder) == before and (folder / "runs/locations-quick/results.jsonl").read_text() == results
    assert "4 trials, 4 done, 0 to run" in said and "report: " in said and "\nlayers 4, 6, 8, 10 " in said
    assert "golden shards" not in said.split("0 to run")[1].split("report:")[0].replace("golden shards of", "")


def test_the_report_has_table_plot_picture_and_labels(killed_and_finished):
    folder, _, _ = killed_and_finished
    report = (folder / "runs/locations-quick/report.md").read_text()
    assert "smoke run" in report and "CLIP ViT-B/16" in report and "16 shots" in report and "CC BY 2.0" in report
    assert report.count("at random (control)") == report.count("reversed (control)") == 4
    for name in ("locations-accuracy.png", "locations-tokens.png"):
        assert name in report
        assert (folder / "runs/locations-quick" / name).read_bytes().startswith(b"\x89PNG")


def test_ray_leaves_nothing_of_its_own_behind(killed_and_finished):
    folder, _, said = killed_and_finished
    assert not list(folder.glob("runs/locations-quick/ray*"))
    for noise in ("WARNING", "RAY_", "ray.tune", "INFO"):
        assert noise not in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["report.claims=[{say: x}]"], "key 'report.claims.0.of' is missing"),
        (["resources.gpu=64"], "resources.gpu is 64, but this machine has"),
        (["resources.cpu=4096"], "resources.cpu is 4096, but this machine has"),
        (["report.paper=table77"], "did you mean 'table7'"),
        (["trial.model.checkpoint=/nowhere.safetensors"], "checkpoint /nowhere.safetensors: there is no such file"),
        (["root=/proc/nowhere"], "cannot write /proc/nowhere"),
        (["shards=/proc/nowhere"], "cannot write /proc/nowhere"),
        (["root=/dev/null"], "cannot write /dev/null"),
        (["root=nosuch://bucket/x"], "fsspec cannot open this kind of URL"),
        (["trial.model.name=patchrank_clip_digits.openai"], "did you mean 'patchrank_clip_digits.embedded'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run_sweep("locations", arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_is_asked_before_trials_wait_for_ever():
    nodes = {"10.0.0.1": {"CPU": 4.0, "GPU": 1.0}, "10.0.0.2": {"CPU": 2.0}}
    assert slots(Resources(cpu=1), nodes) == 6
    assert slots(Resources(cpu=1, gpu=0.5), nodes) == 2
    needs = "each needs cpu 3, gpu 2 .* there are 10.0.0.1: cpu 4, gpu 1; 10.0.0.2: cpu 2, gpu 0"
    with pytest.raises(UserError, match=needs):
        slots(Resources(cpu=3, gpu=2), nodes)
    with pytest.raises(UserError, match="no node holds a trial"):
        slots(Resources(cpu=3, gpu=1), {"a": {"CPU": 4.0}, "b": {"CPU": 2.0, "GPU": 1.0}})


def test_commands_end_with_one_line_and_status_2(tmp_path, run_here):
    said = run_here(tmp_path, "trial.pruning.keep_rate=2", code=2)
    assert said.splitlines()[-1].startswith("error: ") and len(said.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


def test_fresh_runs_everything_again_but_a_plan_removes_nothing(killed_and_finished, run_here):
    folder, _, _ = killed_and_finished
    before = trials(folder)
    said = run_here(folder, "--dry-run", "--fresh")
    assert "0 done, 4 to run" in said and ": done" not in said
    assert trials(folder) == before


def test_a_record_without_its_arrays_is_made_again(killed_and_finished):
    folder, _, _ = killed_and_finished
    where = [f"root={folder}/runs/locations", f"shards={folder}/runs/shards"]
    plan = make_plan(load_sweep("locations", [*where, *SMALL], True))
    assert plan.missing() == 0
    arrays = next(folder.glob("runs/locations-quick/trials/*.npz"))
    arrays.rename(arrays.with_suffix(".away"))
    plan.records.refresh()
    assert plan.missing() == 1
    arrays.with_suffix(".away").rename(arrays)


@pytest.mark.parametrize(
    "axis, message",
    [
        ("pruning.keep_rate: {uniform: [0.9, 0.3]}", "bounds must rise"),
        ("pruning.keep_rate: {uniform: [0.5, 1.5]}", "keep_rate is 1.5"),
        ("pruning.locations: {choice: [[4], [13]]}", "depth 12"),
        ("pruning.keep_rate: {uniform: [0.5, 0.9], when: {predictor.nam: [mix_mlp]}}", "which is not swept"),
        ("pruning.keep_rate: {grid: [0.5, 0.5]}", "must not repeat"),
    ],
)
def test_sampled_axes_are_checked_before_anything_starts(sampled, tmp_path, axis, message):
    (tmp_path / "space.yaml").write_text(axis)
    with pytest.raises(UserError, match=message):
        make_plan(load_sweep(str(tmp_path / "sweep.yaml")))


def test_a_random_search_is_a_plan_that_the_seed_alone_decides(sampled, tmp_path):
    overrides = ["search.method=random", "search.samples=20"]
    plan = make_plan(load_sweep(str(tmp_path / "sweep.yaml"), overrides))
    drawn = [cell.values for cell in plan.cells]
    assert plan.size == len(drawn) == 40 and not plan.sampled
    assert len({json.dumps(values, sort_keys=True) for values in drawn}) == 40
    for values in drawn[3:20]:
        finish(plan, values, tmp_path)
    again = make_plan(load_sweep(str(tmp_path / "sweep.yaml"), overrides))
    search = CellSearch(again)
    asked = [search.suggest(f"t{n}") for n in range(23)]
    assert [each["values"] for each in asked] == drawn[:3] + drawn[20:]
    assert search.suggest("end") == CellSearch.FINISHED
    other = make_plan(load_sweep(str(tmp_path / "sweep.yaml"), [*overrides, "search.seed=1"]))
    assert [cell.values for cell in other.cells] != drawn


@pytest.fixture
def sampled(tmp_path, monkeypatch):
    """A plan with a grid of two cells and three sampled axes, over records in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    source = find_text("sweeps/locations.yaml").replace("../search_spaces/locations.yaml", "space.yaml")
    (tmp_path / "sweep.yaml").write_text(source.replace("{method: grid}", "{method: optuna, samples: 6}"))
    (tmp_path / "space.yaml").write_text(
        """
golden.metric: {grid: [label, preservation]}
pruning.locations: {choice: [[4], [1, 3, 5, 7]]}
pruning.keep_rate: {uniform: [0.3, 0.9], step: 0.1}
predictor.dim: {int: [16, 64], log: true, when: {pruning.locations: [[4]]}}
"""
    )
    return make_plan(load_sweep(str(tmp_path / "sweep.yaml")))


def find_text(name: str) -> str:
    return (Path(__file__).parents[2] / name).read_text()


def finish(plan, values: dict, folder: Path) -> str:
    """Writes the record that a trial would write, with a made-up figure."""
    trial = plan.trial(values)
    identity = plan.identify(trial)
    metrics = {"val_accuracy": 100 * trial.config.pruning.keep_rate}
    record = {"schema": 1, "id": identity, "status": "ok", "config": trial.config.model_dump(), "metrics": metrics}
    (folder / "runs/locations/trials").mkdir(parents=True, exist_ok=True)
    (folder / f"runs/locations/trials/{identity}.json").write_text(json.dumps(record))
    (folder / f"runs/locations/trials/{identity}.npz").write_bytes(b"")
    return identity


def test_optuna_searches_every_cell_without_repeating_and_resumes_from_records(sampled, tmp_path):
    search, seen = CellSearch(sampled), []
    for n in range(7):
        values = search.suggest(f"t{n}")["values"]
        assert values["pruning.keep_rate"] in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
        assert ("predictor.dim" in values) == (values["pruning.locations"] == [4])
        seen.append(finish(sampled, values, tmp_path))
        search.on_trial_complete(f"t{n}", {"val_accuracy": 100 * values["pruning.keep_rate"]})
    assert len(set(seen)) == 7
    again = make_plan(sampled.sweep)
    assert again.missing() == 12 - 7
    resumed = CellSearch(again)
    assert sorted(len(ids) for ids in resumed.ids) == [3, 4]
    assert [len(study.trials) for study in resumed.studies] == [len(ids) for ids in resumed.ids]
    for n in range(5):
        seen.append(finish(again, resumed.suggest(f"r{n}")["values"], tmp_path))
        resumed.on_trial_complete(f"r{n}", {"val_accuracy": float("nan")})  # told as a failure, not left running
    assert len(set(seen)) == 12 and resumed.suggest("end") == CellSearch.FINISHED
    assert make_plan(sampled.sweep).missing() == 0


def test_an_exhausted_cell_ends(sampled, tmp_path):
    (tmp_path / "space.yaml").write_text("pruning.keep_rate: {choice: [0.4, 0.5]}")
    search = CellSearch(make_plan(load_sweep(str(tmp_path / "sweep.yaml"))))
    found = [search.suggest(f"t{n}") for n in range(3)]
    assert found[2] == CellSearch.FINISHED
    assert sorted(config["values"]["pruning.keep_rate"] for config in found[:2]) == [0.4, 0.5]
