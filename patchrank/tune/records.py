"""Records that trials leave behind: of those that finished, that were ended early, and that failed.

<root>/trials/<id>.json          finished, with its arrays in <id>.npz
<root>/trials/<id>.stopped.json  ended early, because it fell behind others or somebody asked for its end
<root>/trials/<id>.error.json    failed; tried again by the next run
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from patchrank.io import exists, join, list_names, read_bytes, read_json, remove
from patchrank.trial.identity import SCHEMA
from patchrank.utils.errors import UserError

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
        """The record of a trial that finished, with its arrays, or was ended early by these very rules or by hand."""
        found = self._read.get(f"{identity}.json")
        if found is not None and found.get("status") == "ok" and f"{identity}.npz" in self._names:
            return found
        found = self._read.get(f"{identity}.stopped.json")
        if found is None or (found.get("by_hand") is not True and (asha is None or found.get("asha") != asha)):
            return None
        return found

    def failed(self, identity: str) -> dict | None:
        """What a trial left that failed when it ran last."""
        return self._read.get(f"{identity}.error.json")

    def configs(self) -> dict[str, dict]:
        """Settings of all trials that left a record of any kind, whichever sweep's they are, by id, sorted."""
        found = {record["id"]: record["config"] for record in self._read.values() if record is not None}
        return dict(sorted(found.items()))

    def finished(self, sweep: str) -> set[str]:
        """Ids of trials that finished in sweeps of a name."""
        known = [record for record in self._read.values() if record is not None and record.get("status") == "ok"]
        return {record["id"] for record in known if record.get("sweep") == sweep}

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
                fault = "is not of the trial that its name says; try removing it, and that is run again"
            elif (schema := found.get("schema")) != SCHEMA:
                fault = f"has schema {schema}, but this version reads {SCHEMA}; try another root, or --fresh"
            elif not isinstance(found.get("config"), dict):
                fault = "holds no settings of a trial; try removing it, and its trial is run again"
            else:
                return found
        except FileNotFoundError:  # removed since it was listed
            return None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            fault = f"is damaged ({error}); try removing it, and its trial is run again"
        if self.lenient or name.endswith(".error.json"):  # which is a mere note
            return None
        raise UserError(f"record {path} {fault}")


def find_outcome(root: str, identity: str, run: str) -> dict | None:
    """What an earlier attempt of the same run left: metrics, or why it ended itself; None for a first attempt."""
    path = join(root, "trials", identity)
    record = read_json(f"{path}.json")
    is_its_own = record is not None and (record.get("id"), record.get("status")) == (identity, "ok")
    if is_its_own and exists(f"{path}.npz"):
        return record["metrics"] | {"id": identity}
    failed = read_json(f"{path}.error.json")
    return {"failure": failed["error"]} if failed is not None and failed.get("run") == run else None
