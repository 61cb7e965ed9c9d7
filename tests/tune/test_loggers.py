"""Seeing what a sweep does: Ray's metrics, trackers, exports, and the page on clusters."""

import json
import re
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import ray
import yaml
from ray.util.metrics import Counter

from patchrank.config import Constraint, Loggers, Objective, Resources, Rule, SweepConfig
from patchrank.tune.cluster import Where, ray_cluster
from patchrank.tune.exports import Study, export_optuna, export_tensorboard
from patchrank.tune.loggers import check_trackers, tracker_callbacks
from patchrank.tune.prometheus import METRICS, count_shard, show_sweep
from patchrank.utils.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"
CLUSTER = (DOCS / "cluster.md").read_text()
EXPORTED = {f"ray_{name}_total" if kind is Counter else f"ray_{name}" for name, (kind, *_) in METRICS.items()}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", CLUSTER, re.S)


def show_all() -> None:
    """Sets every metric that there is."""
    header = {"data": {"task": "digits", "split": "train"}, "grid": [8, 8], "metrics": ["label"]}
    header["golden"] = {"window": 2, "stride": 1, "rounds": 1}  # 49 windows of each image
    folder = types.SimpleNamespace(header=header, sizes=[64], record=lambda index: {"bytes": 768000})
    count_shard(folder, 0, seconds=2.0)
    count_shard(folder, 0, seconds=4.0)
    show_sweep("locations", planned=12, done=5, failed=1, best={"val_accuracy": 97.5, "gmacs": 0.03})


@pytest.mark.slow
def test_rays_own_endpoint_shows_all_metrics():
    def shown() -> dict[str, float]:
        found = {}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith("ray_patchrank_"):
                    labels = sorted(re.findall(r'(?:task|sweep|metric)="([^"]+)"', line))
                    found[" ".join([line.partition("{")[0], *labels])] = float(line.split()[-1])
        return found

    expected = {
        "ray_patchrank_images_scored_total digits/train": 128,
        "ray_patchrank_windows_scored_total digits/train": 6272,
        "ray_patchrank_shard_bytes_total digits/train": 1536000,
        "ray_patchrank_windows_per_second digits/train": 784,
        "ray_patchrank_trials_planned locations": 12,
        "ray_patchrank_trials_done locations": 5,
        "ray_patchrank_trials_failed locations": 1,
        "ray_patchrank_best_value locations val_accuracy": 97.5,
        "ray_patchrank_best_value gmacs locations": 0.03,
    }
    with ray_cluster(Resources(cpu=1), Where()):
        show_all()
        port, deadline = ray.nodes()[0]["MetricsExportPort"], time.monotonic() + 90
        while (found := shown()) != expected and time.monotonic() < deadline:
            show_sweep("locations", planned=12, done=5, failed=1, best={"val_accuracy": 97.5, "gmacs": 0.03})
            time.sleep(1)
    assert found == expected and {name.split()[0] for name in expected} == EXPORTED


def test_metrics_lead_nowhere_and_harm_nothing_without_ray():
    show_all()


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in with what Ray's callback and ours read of it."""
    from ray.air.integrations import wandb as integration

    module = types.ModuleType("wandb")
    module.init = lambda entity=None, project=None, id=None, tags=None, mode=None, dir=None, settings=None: None
    module.login = lambda prompt=True: False
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(integration, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT_NAME", "WANDB_GROUP_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_no_tracker_is_asked_for_and_none_is_there():
    assert tracker_callbacks(Loggers(), "locations") == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"^loggers\.{name}: .*try pip install 'patchrank-clip\[{name}\]'$"):
        check_trackers(Loggers(**{name: {}}))


def test_mlflow_runs_go_to_the_sweeps_experiment(mlflow, monkeypatch):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    (callback,) = tracker_callbacks(Loggers(mlflow={"tracking_uri": "https://mlflow.example.org"}), "locations")
    assert (callback.tracking_uri, callback.experiment_name) == ("https://mlflow.example.org", "patchrank locations")
    (callback,) = tracker_callbacks(Loggers(mlflow={"experiment_name": "ours"}), "locations")
    assert callback.experiment_name == "ours"


def test_wandb_runs_go_to_the_sweeps_group(wandb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (callback,) = tracker_callbacks(Loggers(wandb={"mode": "offline", "entity": "us", "dir": "out"}), "locations")
    assert (callback.project, callback.group) == ("patchrank", "locations")
    assert callback.kwargs == {"mode": "offline", "entity": "us", "dir": str(tmp_path / "out")}
    callback.setup()  # does not ask for a key


def test_the_wandb_key_is_kept_from_runtime_environments(wandb, monkeypatch):
    from ray.air.integrations.wandb import WandbLoggerCallback

    monkeypatch.setenv("WANDB_API_KEY", "secret")
    (callback,) = tracker_callbacks(Loggers(wandb={}), "locations")
    found = []
    monkeypatch.setattr(WandbLoggerCallback, "log_trial_start", lambda self, trial: found.append(sys_key()))
    callback.log_trial_start(None)
    assert found == [None] and sys_key() == "secret"


def sys_key():
    import os

    return os.environ.get("WANDB_API_KEY")


def test_wandb_without_a_key_is_refused_before_anything_starts(wandb, monkeypatch):
    with pytest.raises(UserError, match="loggers.wandb: not logged in; try WANDB_API_KEY"):
        check_trackers(Loggers(wandb={}))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(Loggers(wandb={}))


@pytest.mark.parametrize(
    "loggers, message",
    [
        ({"mlflow": {"tracking_url": "x"}}, r"loggers\.mlflow\.tracking_url: .*did you mean 'tracking_uri'"),
        ({"wandb": {"entitty": "x"}}, r"loggers\.wandb\.entitty: .*did you mean 'entity'"),
        ({"wandb": {"id": "x"}}, r"loggers\.wandb\.id: "),
        ({"wandb": {"api_key": "hunter2"}}, r"loggers\.wandb\.api_key: .*no secret; try WANDB_API_KEY"),
        ({"wandb": {"settings": {"api_key": "hunter2"}}}, r"loggers\.wandb\.settings\.api_key: .*no secret"),
        ({"mlflow": {"tracking_token": "hunter2"}}, r"loggers\.mlflow\.tracking_token: .*MLFLOW_TRACKING_TOKEN"),
        ({"mlflow": {"tracking_uri": "https://me:hunter2@host"}}, r"loggers\.mlflow\.tracking_uri: a URL"),
        ({"mlflow": {"tags": {"where": ["https://host/?token=hunter2"]}}}, r"loggers\.mlflow\.tags\.where: a URL"),
    ],
)
def test_unknown_keys_and_secrets_are_refused_in_one_line(loggers, message, wandb, mlflow):
    with pytest.raises(UserError, match=message) as caught:
        check_trackers(Loggers(**loggers))
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


def row(n: int, accuracy: float = 90.0, status: str = "ok", **more) -> dict:
    config = {"seed": n, "pruning": {"keep_rate": 0.5 + n / 10, "locations": [4, 6]}, "prompt": None}
    metrics = {"accuracy": accuracy, "val_accuracy": accuracy, "gmacs": 0.03 + n / 100}
    metrics["tasks"] = {"digits": {"accuracy": accuracy}}
    record = {"id": f"{n:064x}"[::-1], "status": status, "date": "2026-11-24", "config": config}
    return record | ({"metrics": metrics} if status == "ok" else {}) | more


AXES = ["seed", "pruning.keep_rate", "pruning.locations", "prompt.mode"]


def events(path: Path) -> list:
    """All events of a file, by TensorBoard's own format: length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


def test_each_trial_is_a_tensorboard_run_with_its_settings_and_figures(tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    folder = Path(export_tensorboard([row(0), row(1, 91.0)], str(tmp_path), AXES))
    runs = sorted(path.name for path in folder.iterdir())
    assert runs[1].startswith("seed=1,keep_rate=0.6,locations=4-6.10000000")
    (file,) = (folder / runs[1]).iterdir()
    values = [value for event in events(file) for value in event.summary.value]
    figures = {value.tag: round(value.simple_value, 4) for value in values if not value.tag.startswith("_hparams_")}
    assert figures == {"accuracy": 91.0, "val_accuracy": 91.0, "gmacs": 0.04, "digits/accuracy": 91.0}
    start = next(value for value in values if value.tag == "_hparams_/session_start_info")
    settings = HParamsPluginData.FromString(start.metadata.plugin_data.content).session_start_info.hparams
    assert {key: value.WhichOneof("kind") for key, value in settings.items()} == {
        "seed": "number_value",
        "pruning.keep_rate": "number_value",
        "pruning.locations": "string_value",
    }
    assert settings["pruning.locations"].string_value == "[4, 6]"


def test_tensorboard_runs_are_written_once_and_removed_with_their_trials(tmp_path):
    rows = [row(0), row(1)]
    folder = Path(export_tensorboard(rows, str(tmp_path), AXES))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*tfevents*")}
    export_tensorboard(rows, str(tmp_path), AXES)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*tfevents*")} == before
    export_tensorboard([row(0, 95.0)], str(tmp_path), AXES)
    (left,) = folder.rglob("*tfevents*")
    assert left not in before and any(value.simple_value == 95.0 for e in events(left) for value in e.summary.value)


def test_exports_go_to_urls():
    root = "memory://exports/sweep"
    export_tensorboard([row(0)], root, AXES)
    path = export_optuna([Study("all", [({"seed": 0}, row(0))])], RULES, sweep_of(root))
    import fsspec

    files = fsspec.filesystem("memory").find("/exports/sweep")
    assert len(files) == 2 and path == f"{root}/optuna.log"
    export_tensorboard([], root, AXES)
    assert fsspec.filesystem("memory").find("/exports/sweep") == ["/exports/sweep/optuna.log"]


RULES = {
    "seed": Rule(grid=[0, 1, 2, 3]),
    "pruning.keep_rate": Rule(uniform=[0.3, 0.9]),
    "pruning.locations": Rule(choice=[[4, 6], [2, 3]]),
}
OBJECTIVES = [Objective(metric="val_accuracy", mode="max"), Objective(metric="gmacs", mode="min")]
CONSTRAINTS = [Constraint(metric="gmacs", at_most=0.035), Constraint(metric="val_accuracy", at_least=80.0)]


def sweep_of(root) -> SweepConfig:
    about = {"schema": 1, "name": "small", "root": str(root), "shards": "shards", "spaces": ["space.yaml"]}
    return SweepConfig(**about, objectives=OBJECTIVES, constraints=CONSTRAINTS, report={"table": "axes"})


def studies() -> list[Study]:
    def drawn(n):
        return {"seed": n, "pruning.keep_rate": 0.5 + n / 10, "pruning.locations": [4, 6]}

    lost = row(2, float("nan"))
    failed, stopped = row(3, status="error", error="RuntimeError: no room"), row(3, status="stopped")
    one = [(drawn(0), row(0)), (drawn(1), row(1, 91.0)), (drawn(2), lost), (drawn(3), failed), (drawn(3), stopped)]
    return [Study("mode none", one), Study("mode none", [({"seed": 0}, row(0))])]


def load(path: str, name: str):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(JournalFileBackend(path)))


def test_optuna_reads_the_studies_back(tmp_path):
    path = export_optuna(studies(), RULES, sweep_of(tmp_path))
    study = load(path, "mode none")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "PRUNED"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["val_accuracy", "gmacs"]
    second = study.trials[1]
    assert second.values == [91.0, 0.04]
    assert second.params == {"seed": "1", "pruning.keep_rate": 0.6, "pruning.locations": "[4, 6]"}
    assert second.distributions["pruning.locations"].choices == ("[4, 6]", "[2, 3]")
    assert second.constraints == pytest.approx({"gmacs <= 0.035": 0.005, "val_accuracy >= 80": -11.0})
    assert second.user_attrs["accuracy"] == 91.0 and second.user_attrs["id"] == row(1)["id"]
    assert [trial.number for trial in study.best_trials] == [0]  # the only one that keeps both bounds
    causes = [trial.user_attrs.get("cause") for trial in study.trials[2:]]
    assert causes[:2] == ["val_accuracy could not be measured", "RuntimeError: no room"]
    assert causes[2] == "ended early, since it fell behind others"
    assert len(load(path, "mode none (2)").trials) == 1


def test_an_export_that_is_up_to_date_is_left_alone(tmp_path):
    path = Path(export_optuna(studies(), RULES, sweep_of(tmp_path)))
    before = path.stat().st_mtime_ns
    export_optuna(studies(), RULES, sweep_of(tmp_path))
    assert path.stat().st_mtime_ns == before
    export_optuna(studies()[:1], RULES, sweep_of(tmp_path))
    assert path.stat().st_mtime_ns != before
    with pytest.raises(KeyError):
        load(str(path), "mode none (2)")


def test_the_cluster_file_is_one_that_ray_takes():
    import ray.autoscaler
    from jsonschema import Draft7Validator

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    cluster = yaml.safe_load(next(block for block in blocks("yaml") if "cluster_name" in block))
    assert list(Draft7Validator(schema).iter_errors(cluster)) == []
    assert list(Draft7Validator(schema).iter_errors(cluster | {"workers": 3})) != []
    assert cluster["head_node_type"] in cluster["available_node_types"]
    kinds = cluster["available_node_types"].values()
    assert sum(kind.get("max_workers", 0) for kind in kinds) <= cluster["max_workers"]


def test_the_pages_loggers_and_slurm_script_hold(mlflow, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = yaml.safe_load(next(block for block in blocks("yaml") if block.startswith("loggers")))["loggers"]
    check_trackers(Loggers(**loggers))
    script = next(block for block in blocks("bash") if "#SBATCH" in block)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "ray symmetric-run" in script


def test_the_page_names_every_metric():
    assert set(re.findall(r"ray_patchrank_\w+", CLUSTER)) == EXPORTED
