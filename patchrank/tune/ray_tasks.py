"""What the driver sends to Ray beside trials: shards, which are scored first, and towers, which are timed last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from patchrank.config import SweepConfig
from patchrank.golden.make_shards import report_faults
from patchrank.trial.identity import speed_settings
from patchrank.trial.requirements import ResolvedTrial
from patchrank.tune.plan import Job, Plan
from patchrank.tune.speed import settings_key
from patchrank.tune.worker import score_one, time_one
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress, write_line

ROUNDS = 3  # looks at what there is, of which a node that was lost may have taken some
PATIENCE = 60.0  # seconds, after which somebody should know what a measurement waits for


def stage(plan: Plan, jobs: list[Job], cancels: bool = False) -> None:
    """Makes what is missing, one Ray task a shard, and then every manifest.

    Ray repeats tasks whose worker or node was lost; what was lost after it was made is found and made again.

    Args:
        cancels: what is under way is cancelled where one shard fails or somebody asks for an end. A Ray that is shut
            down next ends it anyway, and must not be asked: Ray 2.60 ends the driver itself where a task is cancelled
            in the moment in which it is done.

    Raises:
        UserError: a shard that cannot be made, with its cause.
    """
    config, made = plan.sweep.config, [job for job in jobs if job.faults]
    resources = config.resources
    for job in made:
        report_faults(job.folder, job.faults)
    for _ in range(ROUNDS):
        waiting = {}
        for job, index in [(each, index) for each in made for index in sorted(each.faults)]:
            how = {"num_cpus": resources.cpu, "num_gpus": resources.gpu}
            task = score_one.options(name=f"score {job.name} shard {index}", **how)
            waiting[task.remote(job.trial.config, config, job.folder.key, index)] = job, index
        if not waiting:
            break
        _await(waiting, cancels)
        for job in made:
            job.faults = job.folder.faults()
    for job in jobs:
        if job in made or not job.folder.complete():
            job.folder.finish(batch=job.batch, threads=resources.num_threads, passed_over=job.passed_over)


def _await(waiting: dict[ray.ObjectRef, tuple[Job, int]], cancels: bool) -> None:
    """Waits for all tasks, each with its job and shard, with a bar that counts images."""
    total = sum(job.folder.sizes[index] for job, index in waiting.values())
    with progress(total=total, desc="golden scores", unit="image", delay=0, smoothing=0.1) as bar:
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=1.0)
                for task in done:
                    job, index = waiting.pop(task)
                    try:
                        job.batch = ray.get(task) or job.batch
                    except RayError as error:
                        if isinstance(getattr(error, "cause", None), UserError):  # bad input speaks for itself
                            raise error.cause from None
                        what = f"shard {index} of {job.name} in {job.folder.path}"
                        raise UserError(f"{what} cannot be made ({_cause(error)})") from None
                    bar.update(job.folder.sizes[index])
        finally:
            for task in waiting if cancels else ():
                ray.cancel(task)


def _cause(error: Exception) -> str:
    """What Ray says of a task that failed, in one line: what the task raised, or what became of its worker."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def measure_alone(trials: Sequence[ResolvedTrial], config: SweepConfig, check: Callable[[], None]) -> None:
    """Measures trials' structures one after the other, each on a node that Ray gives nobody else meanwhile.

    A line says so where one cannot be measured, and the others go on.

    Args:
        check: called before each; may raise to end it all.
    """
    with progress(trials, desc="milliseconds", unit="tower", delay=0) as bar:
        for trial in bar:
            check()
            try:
                ray.get(_started(trial, config))
            except RayError as error:
                what = settings_key(speed_settings(trial))
                write_line(f"  milliseconds of {what} cannot be measured ({_cause(error)})")


def _started(trial: ResolvedTrial, config: SweepConfig):
    """A measurement under way; says so where its node is long in coming, since others have a part of it."""

    def size(node: dict) -> tuple[float, float]:
        return node["Resources"].get("GPU", 0), node["Resources"].get("CPU", 0)

    wanted, alive = config.resources, [node for node in ray.nodes() if node["Alive"]]
    holding = [node for node in alive if size(node)[0] >= wanted.gpu and size(node)[1] >= wanted.cpu]
    # the largest node; of equals the first by address, so that a later run takes the same
    node = max(sorted(holding, key=lambda node: node["NodeManagerAddress"]), key=size)
    whole = {"num_gpus": size(node)[0], "num_cpus": size(node)[1]}
    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = time_one.options(scheduling_strategy=where, name=f"milliseconds of {config.name}", **whole)
    found = task.remote(trial.config, config)
    done, _ = ray.wait([found], timeout=PATIENCE)
    if not done:
        what = ", ".join(f"{key.removeprefix('num_')} {value:g}" for key, value in whole.items() if value)
        write_line(f"  waiting for all of node {node['NodeManagerAddress']} ({what}) to be free")
    return found
