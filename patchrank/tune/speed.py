"""Milliseconds of a sweep's trials: measured when nothing else runs, and read beside their records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

import numpy as np

from patchrank import benchmark
from patchrank.config import Resources, SweepConfig
from patchrank.io import join, list_names, read_json
from patchrank.trial.identity import SCHEMA, speed_settings
from patchrank.trial.requirements import ResolvedTrial
from patchrank.utils.device import hardware

FIGURES = ("ms", "ms_unpruned", "speedup")  # of a measurement, that go into a row


def wants_milliseconds(config: SweepConfig) -> bool:
    """Whether an objective or a bound of a sweep is about milliseconds."""
    return any(each.metric == "ms" for each in (*config.objectives, *config.constraints))


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
        wanted = {"benchmark": self.config.benchmark.model_dump(), "schema": SCHEMA, "version": benchmark.VERSION}
        usable = [record for record in records if record and wanted.items() <= record.items()]
        counts = Counter(settings_key(record["hardware"]) for record in usable)
        where = settings_key(self.own) if self.own else max(sorted(counts), key=counts.__getitem__, default=None)
        self._found = {settings_key(r["settings"]): r for r in usable if settings_key(r["hardware"]) == where}
        models = {record["settings"]["model"] for record in self._found.values()}
        self._unpruned = {model: float(np.median(self._times(model))) for model in models}

    def _times(self, model: str) -> list[float]:
        return [r["ms_unpruned"] for r in self._found.values() if r["settings"]["model"] == model]

    def of(self, trial: ResolvedTrial) -> dict | None:
        """The measurement of a trial's structure; None where there is none.

        A machine is faster at one time than at another, and a tower's unpruned twin feels that as much as the tower.
        So the tower's milliseconds are the twin's median over all measurements, divided by the measured speed-up.
        """
        found = self._found.get(settings_key(speed_settings(trial)))
        if found is None:
            return None
        unpruned = self._unpruned[found["settings"]["model"]]
        return found | {"ms": unpruned / found["speedup"], "ms_unpruned": unpruned}

    def lacking(self, trials: Iterable[ResolvedTrial]) -> list[ResolvedTrial]:
        """One trial of each structure that has yet to be measured.

        On a cluster, if one structure is missing, all are returned: nobody knows which kind of hardware will measure
        them, and a structure that was measured on that kind before costs no time.
        """
        by_structure = {settings_key(speed_settings(trial)): trial for trial in trials if trial.can_be_timed}
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
    return hardware(device_of(resources)) | {"threads": num_threads(resources)}


def device_of(resources: Resources) -> str:
    return "cuda" if resources.gpu else "cpu"


def num_threads(resources: Resources) -> int:
    """How many threads torch gets in a worker."""
    return max(1, int(resources.cpu))


def settings_key(value: dict) -> str:
    return json.dumps(value, sort_keys=True)
