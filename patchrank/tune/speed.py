"""Milliseconds of a sweep's trials: measured when nothing else runs, and read beside their records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from patchrank.benchmark import SCHEMA, VERSION, hardware, speed_settings
from patchrank.config import Resources, SweepConfig, TrialConfig
from patchrank.io import join, list_names, read_json
from patchrank.utils.progress import progress, write_line

PATIENCE = 60.0  # seconds, after which somebody should know what a measurement waits for
FIGURES = ("ms", "ms_unpruned", "speedup")  # of a measurement, that go into a row


def wants_milliseconds(config: SweepConfig) -> bool:
    """Whether an objective or a bound of a sweep is about milliseconds."""
    return any(each.metric == "ms" for each in (*config.objectives, *config.constraints))


def can_be_timed(trial: TrialConfig) -> bool:
    """Whether a trial could be deployed; golden rankings are scores from outside."""
    return trial.pruning.reducer != "golden" or trial.pruning.keep_rate == 1


class Speeds:
    """Measurements below a root, `<root>/speeds/<id>.json`, of one kind of hardware.

    Args:
        own: the hardware that counts; None, on a cluster, for whichever most was measured on.
    """

    def __init__(self, config: SweepConfig, own: dict | None):
        self.config, self.own = config, own
        self._found: dict[str, dict] = {}
        self.refresh()

    def refresh(self) -> None:
        folder = join(self.config.root, "speeds")
        records = [read_json(join(folder, name)) for name in list_names(folder) if name.endswith(".json")]
        wanted = {"benchmark": self.config.benchmark.model_dump(), "schema": SCHEMA, "version": VERSION}
        usable = [record for record in records if record and wanted.items() <= record.items()]
        counts = Counter(_key(record["hardware"]) for record in usable)
        where = _key(self.own) if self.own else max(sorted(counts), key=counts.__getitem__, default=None)
        self._found = {_key(r["settings"]): r for r in usable if _key(r["hardware"]) == where}
        models = {record["settings"]["model"] for record in self._found.values()}
        self._unpruned = {model: float(np.median(self._times(model))) for model in models}

    def _times(self, model: str) -> list[float]:
        return [r["ms_unpruned"] for r in self._found.values() if r["settings"]["model"] == model]

    def of(self, trial: TrialConfig) -> dict | None:
        """The measurement of a trial's structure; None where there is none.

        A machine is faster at one time than at another, which a tower's unpruned twin feels as much as itself: so its
        milliseconds are the twin's median over all measurements, divided by the speed-up that was measured in turns.
        """
        found = self._found.get(_key(speed_settings(trial)))
        if found is None:
            return None
        unpruned = self._unpruned[found["settings"]["model"]]
        return found | {"ms": unpruned / found["speedup"], "ms_unpruned": unpruned}

    def lacking(self, trials: Iterable[TrialConfig]) -> list[TrialConfig]:
        """One trial of each structure that has yet to be measured; on a cluster of each, if any has.

        Which of a cluster's kinds of hardware comes next is not known, and what was measured on that is read anyway.
        """
        by_structure = {_key(speed_settings(trial)): trial for trial in trials if can_be_timed(trial)}
        left = [trial for key, trial in by_structure.items() if key not in self._found]
        return left if self.own or not left else list(by_structure.values())


def beside(record: dict, speed: dict | None) -> dict:
    """A trial's record with its milliseconds, and what these were measured on."""
    if speed is None:
        return record
    about = {key: speed[key] for key in ("id", "hardware", "benchmark")}
    figures = {key: speed[key] for key in FIGURES}
    return record | {"metrics": record["metrics"] | figures, "speed": about}


def own_hardware(resources: Resources) -> dict:
    """This machine, as a worker that takes these resources finds it."""
    return hardware(_device(resources)) | {"threads": max(1, int(resources.cpu))}


def measure_alone(trials: Sequence[TrialConfig], config: SweepConfig, check: Callable[[], None]) -> None:
    """Measures trials' structures one after the other, each on a node that Ray gives nobody else meanwhile.

    One that cannot be measured is told, and the others go on.

    Args:
        check: called before each; may raise to end it all.
    """
    import ray

    with progress(trials, desc="milliseconds", unit="tower", delay=0) as bar:
        for trial in bar:
            check()
            try:
                ray.get(_started(trial, config))
            except ray.exceptions.RayTaskError as error:
                last = f"{type(error.cause).__name__}: {error.cause}"
            except ray.exceptions.RayError as error:
                last = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
            else:
                continue
            write_line(f"  milliseconds of {_key(speed_settings(trial))} cannot be measured ({last})")


def _started(trial: TrialConfig, config: SweepConfig):
    """A measurement under way; says so where its node is long in coming, since others have a part of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from patchrank.tune.worker import time_one

    resources, node = config.resources, _node(config.resources, ray.nodes())
    whole = {"num_cpus": node["Resources"].get("CPU", 1), "num_gpus": node["Resources"].get("GPU", 0)}
    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = time_one.options(scheduling_strategy=where, name=f"milliseconds of {config.name}", **whole)
    job = {"imports": config.imports, "cpu": resources.cpu, "device": _device(resources)}
    found = task.remote(trial.model_dump(), config.benchmark.model_dump(), join(config.root, "speeds"), job)
    done, _ = ray.wait([found], timeout=PATIENCE)
    if not done:
        what = ", ".join(f"{key.removeprefix('num_')} {value:g}" for key, value in whole.items() if value)
        write_line(f"  waiting for all of node {node['NodeManagerAddress']} ({what}) to be free")
    return found


def _node(resources: Resources, nodes: list[dict]) -> dict:
    """The largest node that holds a trial; of equals the first by address, so that a later run takes the same."""
    fitting = [
        node
        for node in nodes
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= resources.cpu
        and node["Resources"].get("GPU", 0) >= resources.gpu
    ]
    size = {node["NodeID"]: (node["Resources"].get("GPU", 0), node["Resources"].get("CPU", 0)) for node in fitting}
    return max(sorted(fitting, key=lambda node: node["NodeManagerAddress"]), key=lambda node: size[node["NodeID"]])


def _device(resources: Resources) -> str:
    return "cuda" if resources.gpu else "cpu"


def _key(value: dict) -> str:
    return json.dumps(value, sort_keys=True)
