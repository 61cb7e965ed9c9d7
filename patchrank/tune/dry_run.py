"""What `--dry-run` prints: how much work a sweep is, and about how long it takes."""

from __future__ import annotations

import torch

from patchrank.benchmark import WARM_UP
from patchrank.trial.forecast import Work, count_shards, count_trial, time_batch
from patchrank.trial.requirements import ResolvedTrial
from patchrank.tune.cluster import Where, own_machine, slots
from patchrank.tune.console import say
from patchrank.tune.plan import Job, Plan
from patchrank.tune.space import random_points

START = 30.0  # seconds that Ray, the imports of its workers and the report take; measured on 2 cores


def print_estimate(plan: Plan, jobs: list[Job], fresh: bool, where: Where) -> None:
    """Prints what is to be done and about how long it takes. Writes nothing and starts no Ray.

    A cluster is not asked how large it is: its trials count as if they ran one at a time on this machine.
    """
    trials = _to_run(plan, fresh)
    if not trials:
        return
    resources, benchmark = plan.sweep.config.resources, plan.sweep.config.benchmark
    workers = 1 if where.address else min(slots(resources, {"this machine": own_machine()}), len(trials))
    scoring, running = Work(), Work()
    for job in jobs:
        count_shards(job.folder, job.faults, plan.context(job.trial), scoring)
    for n, trial in enumerate(trials):
        count_trial(plan.context(trial), n % workers, running)
    towers = [] if plan.speeds is None else plan.speeds.lacking(trials)
    turns = 2 * benchmark.batch_size * (benchmark.repeats + WARM_UP)  # with the unpruned twin, one after the other
    timing = sum(turns * plan.inputs(trial).clip.visual.macs_unpruned().image for trial in towers)
    say(f"  golden shards: {sum(len(job.faults) for job in jobs):,} to make, {scoring.told('windows')}")
    say(f"  trials: {len(trials):,} to run, {running.told('images')}")
    if towers:
        say(f"  milliseconds: {len(towers):,} towers to measure, {turns * len(towers):,} forwards of images")
    device = "cuda" if resources.gpu and torch.cuda.is_available() else "cpu"
    per_mac, per_image = time_batch(plan.context(trials[0]), device, resources.num_threads)
    macs = (scoring.macs + running.macs) / workers + timing
    seconds = START + macs * per_mac + (scoring.images_read + running.images_read) / workers * per_image
    say(
        f"  in all about {seconds / 60:.1f} min with {workers} trials at a time on this machine: an estimate by MACs, "
        f"from one batch that was timed ({device}). It may take half as long, or twice as long"
    )


def _to_run(plan: Plan, fresh: bool) -> list[ResolvedTrial]:
    """Trials that have no record; of a search, whose trials nobody knows beforehand, as many at random."""
    config, points = plan.sweep.config, []
    for cell in plan.cells:
        left = cell.samples - (0 if fresh else len(list(plan.records_of(cell))))
        if left > 0 and plan.sampled:
            search = config.search.model_copy(update={"samples": left})
            points += random_points(cell.values, cell.sampled, config.model_copy(update={"search": search}))
        elif left > 0:
            points.append(cell.values)
    return [plan.trial(point) for point in points]
