"""Records that trials leave behind: of those that finished, that were ended early, and that failed; and milliseconds.

<root>/trials/<id>.json          finished, with its arrays in <id>.npz
<root>/trials/<id>.stopped.json  ended early, because it fell behind others
<root>/trials/<id>.error.json    failed; tried again by the next run
<root>/speeds/<id>.json          milliseconds of a tower, measured when nothing else ran
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from patchrank import benchmark
from patchrank.config import SweepConfig
from patchrank.io import exists, join, list_names, read_bytes, read_json, remove
from patchrank.trial.identity import SCHEMA, speed_settings
from patchrank.trial.requirements import ResolvedTrial
from patchrank.utils.device import hardware
from patchrank.utils.errors import UserError

STEP, VALUE = "step", "step_value"  # keys of a report that is no result yet, and of how far a trial came
READERS = 16  # records read at a time; object stores answer slowly, but many at once


class Records:
    """The records below a root, read in one go and each once.

    Args:
        lenient: passes over what cannot be used, instead of refusing it.

    Raises:
        UserError: a record that is damaged, of another schema, or not of the trial that its name says.
    """

    def __init__(self, root: str, lenient: bool = False):
        self.root = root
        self.lenient = lenient
        self._names: set[str] = set()
        self._read: dict[str, dict | None] = {}  # by name; failures are read again, since they may be others by now
        self.refresh()

    def refresh(self) -> None:
        """Reads what has come since."""
        self._names = set(list_names(join(self.root, "trials")))
        gone = [name for name in self._read if name not in self._names or name.endswith(".error.json")]
        for name in gone:
            del self._read[name]
        new = sorted(name for name in self._names - self._read.keys() if name.endswith(".json"))
        with ThreadPoolExecutor(READERS) as pool:
            self._read |= zip(new, pool.map(self._load, new))

    def ended(self, identity: str, asha: dict | None) -> dict | None:
        """The record of a trial that finished, with its arrays, or was ended early by these very rules."""
        found = self._read.get(f"{identity}.json")
        if found is not None and found.get("status") == "ok" and f"{identity}.npz" in self._names:
            return found
        found = self._read.get(f"{identity}.stopped.json")
        return found if found is not None and asha is not None and found.get("asha") == asha else None

    def failed(self, identity: str) -> dict | None:
        """What a trial left that failed when it ran last."""
        return self._read.get(f"{identity}.error.json")

    def configs(self) -> dict[str, dict]:
        """Settings of all trials that left a record of any kind, whichever sweep's they are, by id, sorted."""
        found = {record["id"]: record["config"] for record in self._read.values() if record is not None}
        return dict(sorted(found.items()))

    def forget(self, identity: str) -> None:
        """Removes all records of a trial."""
        for name in (f"{identity}{kind}.json" for kind in ("", ".stopped", ".error")):
            if self._read.pop(name, None) is not None:
                remove(join(self.root, "trials", name))

    def _load(self, name: str) -> dict | None:
        path = join(self.root, "trials", name)
        try:
            found = json.loads(read_bytes(path))
            if not isinstance(found, dict) or found.get("id") != name.split(".")[0]:
                fault = "is not of the trial that its name says; remove it, and that is run again"
            elif (schema := found.get("schema")) != SCHEMA:
                fault = f"has schema {schema}, but this version reads {SCHEMA}; try another root, or --fresh"
            else:
                return found
        except FileNotFoundError:  # removed since it was listed
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            fault = f"is damaged ({error}); remove it, and its trial is run again"
        if self.lenient or name.endswith(".error.json"):  # which is a mere note
            return None
        raise UserError(f"record {path} {fault}")


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


def find_outcome(root: str, identity: str, run: str) -> dict | None:
    """What an earlier attempt of the same run left: metrics, or why it ended itself; None for a first attempt."""
    path = join(root, "trials", identity)
    record = read_json(f"{path}.json")
    if record is not None and record.get("id") == identity and exists(f"{path}.npz"):
        return record["metrics"] | {"id": identity}
    failed = read_json(f"{path}.error.json")
    return {"failure": failed["error"]} if failed is not None and failed.get("run") == run else None


def settings_key(value: dict) -> str:
    """A text that is the same for equal settings."""
    return json.dumps(value, sort_keys=True)
