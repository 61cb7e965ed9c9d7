"""What the driver says, all on stderr; Ray is not needed for it."""

from __future__ import annotations

import sys
from typing import NamedTuple

from patchrank.config import TrialConfig
from patchrank.fit import WARNINGS
from patchrank.tune.plan import Plan

SHOWN = 16  # trials that a plan lists by name


class Failure(NamedTuple):
    """A trial that did not come to its end: values of its axes, and why."""

    values: dict[str, object]
    cause: str

    def told(self) -> tuple[str, str]:
        """Its settings in words, and why."""
        return describe(self.values), self.cause


def describe(values: dict[str, object]) -> str:
    """Swept settings in short: `locations [2, 3, 4, 5]`."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in values.items()) or "the sweep's trial"


def print_plan(plan: Plan, jobs: list, missing: int) -> None:
    """What is there and what will be done, before anything starts."""
    config = plan.sweep.config
    say(f"sweep {config.name}: {plan.size} trials, {plan.size - missing} done, {missing} to run")
    for note in plan.sweep.notes:
        say(f"  note: {note}")
    for key in plan.unmet_axes():
        say(f"  note: {key} is not swept, since no point of the grid meets its `when`")
    if not plan.prunes():
        say("  note: keep_rate is 1 in all trials, so nothing is pruned; try trial.pruning.keep_rate=0.6")
    if plan.left_out:
        say(f"  note: {plan.left_out} points of the grid break the bound on GMACs and are left out")
    for warning in sorted({WARNINGS.get(trial.predictor.loss, "") for trial in _fitted(plan)} - {""}):
        say(f"  note: {warning}")
    for cell in plan.cells[:SHOWN]:
        done = 0 if missing == plan.size else sum(1 for _ in plan.records_of(cell))  # --fresh: records do not count
        state = "done" if done >= cell.samples else "to run" if cell.samples == 1 else f"{done} of {cell.samples} done"
        say(f"  {describe(cell.values)}: {state}")
    if len(plan.cells) > SHOWN:
        say(f"  and {len(plan.cells) - SHOWN} more")
    for job in jobs:
        count, size = job.folder.header["data"]["count"], len(job.folder.sizes)
        state = f"{len(job.faults)} of {size} to make" if job.faults else "ready"
        say(f"  golden shards of {job.name} ({count} images): {state}")
    say(f"  records in {config.root}/trials, {config.resources.cpu:g} cpu and {config.resources.gpu:g} gpu a trial")


def _fitted(plan: Plan) -> list[TrialConfig]:
    trials = [plan.trial(cell.values) for cell in plan.cells]
    return [trial for trial in trials if trial.pruning.reducer == "predictor"]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
