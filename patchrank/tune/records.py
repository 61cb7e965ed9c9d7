"""What trials have left behind: records of the finished, of those ended early, and of those that failed.

<root>/trials/<id>.json          finished, with its arrays in <id>.npz
<root>/trials/<id>.stopped.json  ended early, since it fell behind others
<root>/trials/<id>.error.json    failed; tried again by the next run
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from patchrank.io import join, list_names, read_bytes, remove
from patchrank.trial.run import SCHEMA
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

    def finished(self, identity: str) -> dict | None:
        """The record of a finished trial whose arrays are there as well."""
        found = self._read.get(f"{identity}.json")
        is_whole = found is not None and found.get("status") == "ok" and f"{identity}.npz" in self._names
        return found if is_whole else None

    def stopped(self, identity: str, asha: dict | None) -> dict | None:
        """The record of a trial that was ended early by these very rules; None where there are none."""
        found = self._read.get(f"{identity}.stopped.json")
        return found if found is not None and asha is not None and found.get("asha") == asha else None

    def failed(self, identity: str) -> dict | None:
        """What a trial left that failed when it ran last."""
        return self._read.get(f"{identity}.error.json")

    def ids(self) -> list[str]:
        """Ids of all trials that left a record of any kind, whichever sweep's they are, sorted."""
        return sorted({found["id"] for found in self._read.values() if found is not None})

    def forget(self, identity: str) -> None:
        """Removes all records of a trial."""
        for name in (f"{identity}{kind}.json" for kind in ("", ".stopped", ".error")):
            if self._read.pop(name, None) is not None:
                remove(join(self.root, "trials", name))

    def _load(self, name: str) -> dict | None:
        path, is_mere_note = join(self.root, "trials", name), name.endswith(".error.json")
        try:
            return self._checked(path, name.split(".")[0])
        except FileNotFoundError:  # removed since it was listed
            return None
        except UserError:
            if self.lenient or is_mere_note:
                return None
            raise

    def _checked(self, path: str, identity: str) -> dict:
        try:
            found = json.loads(read_bytes(path))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"record {path} is damaged ({error}); remove it, and its trial is run again") from error
        if not isinstance(found, dict) or found.get("id") != identity:
            raise UserError(f"record {path} is not of the trial that its name says; remove it, and that is run again")
        if found.get("schema") != SCHEMA:
            raise UserError(
                f"record {path} has schema {found.get('schema')}, but this version reads {SCHEMA}; "
                "near: another root, or --fresh"
            )
        return found
