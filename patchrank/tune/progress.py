"""A bar that moves, a line per finished trial, and the table at the end; all on stderr."""

from __future__ import annotations

import sys
import time

from ray.tune import Callback
from tqdm import tqdm

from patchrank.tune.plan import Plan


class Progress(Callback):
    """Shows how trials go on; Ray's own reporting is off."""

    def __init__(self, total: int):
        self.bar = tqdm(total=total, desc="trials", unit="trial", file=sys.stderr)
        self.every = 1.0 if sys.stderr.isatty() else 15.0  # seconds between refreshes; logs should stay readable
        self.shown = 0.0
        self.started: dict[str, float] = {}
        self.errors: list[str] = []

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
        self.errors.append(trial.trial_id)
        self.bar.write(f"  {describe(trial.config['values'])}: failed", file=sys.stderr)
        self.bar.update()

    def _show(self, trials) -> None:
        if time.time() - self.shown < self.every:
            return
        self.shown = time.time()
        running = sum(trial.status == "RUNNING" for trial in trials)
        self.bar.set_postfix_str(f"{running} running", refresh=True)


def describe(values: dict[str, object]) -> str:
    """Swept settings in short: `locations [2, 3, 4, 5]`."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in values.items()) or "the sweep's trial"


def print_plan(plan: Plan, jobs: list, missing: int) -> None:
    """What is there and what will be done, before anything starts."""
    config = plan.sweep.config
    say(f"sweep {config.name}: {plan.size} trials, {plan.size - missing} done, {missing} to run")
    for note in plan.sweep.notes:
        say(f"  note: {note}")
    for cell in plan.cells:
        done = sum(1 for _ in plan.records_of(cell))
        state = "done" if done >= cell.samples else "to run" if cell.samples == 1 else f"{done} of {cell.samples} done"
        say(f"  {describe(cell.values)}: {state}")
    for job in jobs:
        data, size = job.folder.header["data"], len(job.folder.sizes)
        state = f"{len(job.faults)} of {size} to make" if job.faults else "ready"
        say(f"  golden shards of {data['task']}/{data['split']} ({data['count']} images): {state}")
    say(f"  records in {config.root}/trials, {config.resources.cpu:g} cpu and {config.resources.gpu:g} gpu a trial")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
