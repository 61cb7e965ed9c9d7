"""A bar that moves and a line per finished trial: what Ray's own reporting is replaced by."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ray.tune import Callback
from tqdm import tqdm

from patchrank.tune.progress import describe


class Progress(Callback):
    """Shows how trials go on; Ray's own reporting is off."""

    def __init__(self, total: int):
        self.bar = tqdm(total=total, desc="trials", unit="trial", file=sys.stderr)
        self.every = 1.0 if sys.stderr.isatty() else 15.0  # seconds between refreshes; logs should stay readable
        self.shown = 0.0
        self.started: dict[str, float] = {}
        self.failures: list[str] = []

    def __getstate__(self) -> dict:
        return {}  # Ray pickles its callbacks; a bar does not travel

    def on_trial_start(self, iteration, trials, trial, **info) -> None:
        self.started[trial.trial_id] = time.time()
        self._show(trials)

    def on_step_end(self, iteration, trials, **info) -> None:
        self._show(trials)

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        metrics, took = trial.last_result or {}, time.time() - self.started.get(trial.trial_id, time.time())
        figures = ", ".join(f"{key} {metrics[key]:.1f}" for key in ("val_accuracy", "accuracy") if key in metrics)
        self.bar.write(f"  {describe(trial.config['values'])}: {figures} ({took:.0f} s)", file=sys.stderr)
        self.bar.update()

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        reason = _last_line(trial.error_file)
        self.failures.append(f"{describe(trial.config['values'])}: {reason}")
        self.bar.write(f"  {self.failures[-1]}", file=sys.stderr)
        self.bar.update()

    def _show(self, trials) -> None:
        if time.time() - self.shown < self.every:
            return
        self.shown = time.time()
        running = sum(trial.status == "RUNNING" for trial in trials)
        self.bar.set_postfix_str(f"{running} running", refresh=True)


def _last_line(error_file: str | None) -> str:
    """What ended a trial, from the traceback that Ray keeps: the only trace where a worker died."""
    if not error_file or not Path(error_file).exists():
        return "its worker died"
    lines = [line.strip() for line in Path(error_file).read_text().splitlines() if line.strip()]
    return lines[-1] if lines else "its worker died"
