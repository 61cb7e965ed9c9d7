"""Milliseconds of a sweep's towers, `<root>/speeds/<id>.json`: measured when nothing else runs, read beside records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

import numpy as np

from patchrank import benchmark
from patchrank.config import SweepConfig
from patchrank.io import join, list_names, read_json
from patchrank.trial.identity import SCHEMA, speed_settings
from patchrank.trial.requirements import ResolvedTrial
from patchrank.utils.device import hardware


class Speeds:
    """Measurements below a root, `<root>/speeds/<id>.json`, of one kind of hardware.

    Args:
        on_cluster: whether the hardware counts that most was measured on, instead of this machine.
    """

    def __init__(self, config: SweepConfig, on_cluster: bool):
        here, self.config = config.resources, config
        self.own = None if on_cluster else hardware(here.device) | {"threads": here.num_threads}
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
        times: dict[str, list[float]] = {}
        for record in self._found.values():
            times.setdefault(record["settings"]["model"], []).append(record["ms_unpruned"])
        self._unpruned = {model: float(np.median(measured)) for model, measured in times.items()}

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

    def beside(self, record: dict, trial: ResolvedTrial) -> dict:
        """A trial's record with its milliseconds, and what these were measured on, where that was done."""
        speed = self.of(trial)
        if speed is None:
            return record
        figures = {key: speed[key] for key in ("ms", "ms_unpruned", "speedup")}
        about = {key: speed[key] for key in ("id", "hardware", "benchmark")}
        return record | {"metrics": record["metrics"] | figures, "speed": about}

    def lacking(self, trials: Iterable[ResolvedTrial]) -> list[ResolvedTrial]:
        """One trial of each structure that has yet to be measured.

        On a cluster, if one structure is missing, all are returned: nobody knows which kind of hardware will measure
        them, and a structure that was measured on that kind before costs no time.
        """
        by_structure = {settings_key(speed_settings(trial)): trial for trial in trials if trial.can_be_timed}
        left = [trial for key, trial in by_structure.items() if key not in self._found]
        return left if self.own or not left else list(by_structure.values())


def settings_key(value: dict) -> str:
    """A text that is the same for equal settings."""
    return json.dumps(value, sort_keys=True)
