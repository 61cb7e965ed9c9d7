"""What `--dry-run` prints beside the plan: the amount of work, and how long it is going to take."""

from __future__ import annotations

import os

import torch

from patchrank.benchmark import WARM_UP, measure
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.speed import random_tower
from patchrank.tune.cluster import Where, slots
from patchrank.tune.console import say
from patchrank.tune.forecast.estimate import estimate
from patchrank.tune.plan import Cell, Plan
from patchrank.tune.ray_tasks import Job
from patchrank.tune.space import random_points


def forecast(plan: Plan, jobs: list[Job], fresh: bool, where: Where) -> None:
    """Prints an estimate from a few timed steps; of a cluster, which is not asked, for one trial at a time."""
    resources = plan.sweep.config.resources
    trials = [trial for cell in plan.cells for trial in _to_run(plan, cell, fresh)]
    if not trials:
        return
    there = {"this machine": {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}}
    at_a_time = 1 if where.address else slots(resources, there)
    device = "cuda" if resources.gpu and torch.cuda.is_available() else "cpu"
    for line in estimate(jobs, trials, plan.inputs, at_a_time, resources.cpu, device).lines():
        say(f"  {line}")
    if plan.speeds is not None and (left := plan.speeds.lacking(trials)):
        each = _measuring(plan, left[0])
        say(f"  milliseconds: {len(left)} towers at most, one at a time, about {len(left) * each / 60:.1f} min more")


def _measuring(plan: Plan, trial: ResolvedTrial) -> float:
    """Seconds that a tower's milliseconds take, from a few runs of this one."""
    few = measure(random_tower(trial), plan.sweep.config.benchmark.batch_size, repeats=3)
    turns = plan.sweep.config.benchmark.repeats + WARM_UP
    return turns * plan.sweep.config.benchmark.batch_size * (few["ms"] + few["ms_unpruned"]) / 1000


def _to_run(plan: Plan, cell: Cell, fresh: bool) -> list[ResolvedTrial]:
    """Trials of a cell that have no record; of a search, which nobody knows beforehand, as many at random."""
    left = cell.samples if fresh else cell.samples - len(list(plan.records_of(cell)))
    if left <= 0 or not plan.sampled:
        return [plan.trial(cell.values)] * max(0, left)
    config = plan.sweep.config
    search = config.search.model_copy(update={"samples": left})
    points = random_points(cell.values, plan.sampled, config.trial, search, config.constraints)
    return [plan.trial(point) for point in points]
