"""Trials as they go: a bar that moves, a line per finished one, and what became of each."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

from ray.tune import Callback
from tqdm import tqdm

from patchrank.errors import UserError
from patchrank.files import join, write_json
from patchrank.trial import error_record
from patchrank.tune.plan import Plan
from patchrank.tune.progress import describe

SHOWN = ("val_accuracy", "val_cosine", "gmacs", "accuracy")


class Progress(Callback):
    """Shows how trials go on, since Ray's own reporting is off, and records those that cannot do so themselves."""

    def __init__(self, plan: Plan, total: int, run: str):
        self.plan, self.run = plan, run
        self.bar = tqdm(total=total, desc="trials", unit="trial", file=sys.stderr)
        self.every = 1.0 if sys.stderr.isatty() else 15.0  # seconds between refreshes; logs should stay readable
        self.shown = 0.0
        self.started: dict[str, float] = {}
        self.failures: dict[str, tuple[str, str]] = {}  # by trial id: its settings in words, and its cause

    def __getstate__(self) -> dict:
        return {}  # Ray pickles its callbacks; a bar does not travel

    def on_trial_start(self, iteration, trials, trial, **info) -> None:
        self.started[trial.trial_id] = time.time()
        self._show(trials)

    def on_step_end(self, iteration, trials, **info) -> None:
        self._show(trials)

    def on_trial_recover(self, iteration, trials, trial, **info) -> None:
        self._say(trial, f"is tried again ({_last_line(trial.error_file)})")

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        found, took = trial.last_result or {}, time.time() - self.started.pop(trial.trial_id, time.time())
        if "id" in found:
            figures = ", ".join(f"{key} {found[key]:.4g}" for key in SHOWN if key in found)
            self._say(trial, f"{figures} ({took:.0f} s)")
        else:
            self._fail(trial, found.get("failure", "it ended without reporting anything"))
        self.bar.update()

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        self.started.pop(trial.trial_id, None)
        self._fail(trial, _last_line(trial.error_file))
        self.bar.update()

    def _fail(self, trial, cause: str) -> None:
        """Notes a failure; one that the trial could not write down itself is written down here."""
        settings = self.plan.trial(trial.config["values"])
        identity, root = self.plan.identify(settings), self.plan.sweep.config.root
        self.failures[identity] = describe(trial.config["values"]), cause
        self._say(trial, cause)
        with suppress(UserError):  # of a store that takes nothing, the report at the end still tells
            record = error_record(settings, identity, self.plan.sweep.config.name, cause)
            write_json(join(root, "trials", f"{identity}.error.json"), record | {"run": self.run})

    def _say(self, trial, text: str) -> None:
        self.bar.write(f"  {describe(trial.config['values'])}: {text}", file=sys.stderr)

    def _show(self, trials) -> None:
        if time.time() - self.shown < self.every:
            return
        self.shown = time.time()
        self.bar.set_postfix_str(f"{len(self.started)} running", refresh=True)


def _last_line(error_file: str | None) -> str:
    """What ended a trial, from the traceback that Ray keeps: the only trace where a worker died."""
    if not error_file or not Path(error_file).exists():
        return "its worker died"
    text = Path(error_file).read_text()
    if "OutOfMemory" in text or "memory pressure" in text or "running low on memory" in text:
        return "its worker was killed by Ray: the node ran out of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "its worker died"
