"""Attempts at a trial: what an earlier one came to, and the time that one may take."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from patchrank.config import TrialConfig
from patchrank.io import exists, join, read_json, write_json
from patchrank.trial.run import error_record


def find_outcome(root: str, identity: str, run: str) -> dict | None:
    """What an earlier attempt of the same run left: metrics, or why it ended itself; None for a first attempt."""
    path = join(root, "trials", identity)
    record = read_json(f"{path}.json")
    if record is not None and record.get("id") == identity and exists(f"{path}.npz"):
        return record["metrics"] | {"id": identity}
    failed = read_json(f"{path}.error.json")
    return {"failure": failed["error"]} if failed is not None and failed.get("run") == run else None


@contextmanager
def time_limit(
    seconds: float | None, root: str, trial: TrialConfig, identity: str, sweep: str, run: str
) -> Iterator[None]:
    """Ends the worker, with a record that says why, if the block takes longer; whatever it hangs in cannot be asked to.

    Args:
        run: name of the driver's run, whose next attempt at the trial then reports the failure.
    """

    path = join(root, "trials", identity)

    def end() -> None:
        if exists(f"{path}.stopped.json"):  # and its thread waits in vain, as Ray leaves it
            return
        reason = f"TimeoutError: ran longer than time_limit = {seconds:g} seconds"
        record = error_record(trial, identity, sweep, reason) | {"run": run}
        try:
            write_json(f"{path}.error.json", record)
        finally:
            os._exit(1)

    timer = threading.Timer(seconds or 0, end)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
