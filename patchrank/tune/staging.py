"""Golden shards first: they cost the most, and trials share them."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from tqdm import tqdm

from patchrank.config import TrialConfig
from patchrank.data.shards import ShardFolder
from patchrank.errors import UserError
from patchrank.golden import BATCH_SIZE, report_faults
from patchrank.trial import needed_shards
from patchrank.tune.plan import Plan


@dataclass
class Job:
    """One set of shards: a trial that needs it, and the shards to make."""

    trial: TrialConfig
    folder: ShardFolder
    faults: dict[int, str]


def staging_jobs(plan: Plan) -> list[Job]:
    """All sets of shards that a sweep needs, each once."""
    jobs: dict[str, Job] = {}
    for trial in plan.staged():
        for _, folder in needed_shards(trial, plan.inputs(trial), plan.sweep.config.shards).values():
            if folder.key not in jobs:
                jobs[folder.key] = Job(trial, folder, folder.faults())
    return list(jobs.values())


def stage(plan: Plan, jobs: list[Job], slots: int) -> None:
    """Makes what is missing with Ray tasks, a few shards each, and then every manifest. Raises what a task raised."""
    import ray

    from patchrank.tune.worker import score_some

    resources, waiting = plan.sweep.config.resources, []
    total = sum(len(job.faults) for job in jobs)
    for job in jobs:
        report_faults(job.folder, job.faults)
        remote = score_some.options(num_cpus=resources.cpu, num_gpus=resources.gpu)
        for chunk in _chunks(sorted(job.faults), max(1, math.ceil(total / (4 * slots)))):
            args = job.trial.model_dump(), plan.sweep.config.shards, job.folder.key, chunk
            waiting.append(remote.remote(*args, resources.cpu, resources.gpu))
    every = 1.0 if sys.stderr.isatty() else 15.0
    with tqdm(total=total, desc="golden shards", unit="shard", disable=not total, mininterval=every) as bar:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=1.0)
            bar.update(sum(_results(done)))
    for job in jobs:
        if job.faults or not job.folder.complete():
            job.folder.finish(batch=BATCH_SIZE, threads=max(1, int(resources.cpu)))


def _results(done: list) -> list[int]:
    """What tasks returned; bad input comes out as itself, without Ray's wrapping."""
    import ray

    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
