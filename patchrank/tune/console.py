"""What the driver prints, all of it on stderr. It needs no Ray."""

from __future__ import annotations

import sys
from typing import NamedTuple

from patchrank.fit import WARNINGS
from patchrank.tune.plan import Job, Plan

SHOWN = 16  # trials that a plan lists by name


class Failure(NamedTuple):
    """A trial that did not come to its end: values of its axes, and why."""

    values: dict[str, object]
    cause: str


def describe(values: dict[str, object]) -> str:
    """Swept settings in short: `locations [2, 3, 4, 5]`."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in values.items()) or "the sweep's trial"


def print_plan(plan: Plan, jobs: list[Job], missing: int) -> None:
    """Prints what is there and what will be done, before anything starts."""
    config, is_fresh = plan.sweep.config, missing == plan.size  # --fresh: records do not count
    stopped = {} if is_fresh else {record["id"]: values for values, record in plan.stopped_by_hand()}
    done = plan.size - missing - len(stopped)
    ended = f", {len(stopped)} stopped by hand" if stopped else ""
    say(f"sweep {config.name}: {plan.size} trials, {done} done, {missing} to run{ended}")
    if aside := plan.set_aside():
        note = f"finished trials that are not in this plan: {aside}; their records stay, and count again once they are"
        say(f"  note: {note}")
    for note in plan.sweep.notes:
        say(f"  note: {note}")
    for key in plan.unmet_axes():
        say(f"  note: {key} is not swept, since no point of the grid meets its `when`")
    if not plan.prunes():
        say("  note: keep_rate is 1 in all trials, so nothing is pruned; try trial.pruning.keep_rate=0.6")
    if plan.left_out:
        say(f"  note: {plan.left_out} points of the grid break the bound on GMACs and are left out")
    trials = [plan.trial(cell.values) for cell in plan.cells]
    losses = {trial.config.predictor.loss for trial in trials if trial.ranks_by_predictor}
    for loss in sorted(losses & WARNINGS.keys()):
        say(f"  note: {WARNINGS[loss]}")
    for cell in plan.cells[:SHOWN]:
        known = [] if is_fresh else [record for record, _ in plan.records_of(cell)]
        done, state = len(known), f"{len(known)} of {cell.samples} done"
        if cell.samples == 1 and known and known[0].get("by_hand"):
            state = "stopped by hand"
        elif done >= cell.samples:
            state = "done"
        elif cell.samples == 1:
            state = "to run"
        say(f"  {describe(cell.values)}: {state}")
    if len(plan.cells) > SHOWN:
        say(f"  and {len(plan.cells) - SHOWN} more")
    for job in jobs:
        count, size = job.folder.header["data"]["count"], len(job.folder.sizes)
        state = f"{len(job.faults)} of {size} to make" if job.faults else "ready"
        say(f"  golden shards of {job.name} ({count} images): {state}")
    say(f"  records in {config.root}/trials, {config.resources.cpu:g} cpu and {config.resources.gpu:g} gpu a trial")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
