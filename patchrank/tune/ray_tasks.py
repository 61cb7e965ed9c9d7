"""Work on Ray that is no trial: golden shards, which come first, and milliseconds, which come last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchrank.config import Resources, SweepConfig
from patchrank.golden.make_shards import report_faults
from patchrank.golden.scores import batch_size_of
from patchrank.golden.shards import ShardFolder
from patchrank.trial.identity import speed_settings
from patchrank.trial.requirements import ResolvedTrial
from patchrank.tune.plan import Plan
from patchrank.tune.speed import device_of, num_threads, settings_key
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress, write_line

ROUNDS = 3  # looks at what there is, of which a node that was lost may have taken some
PATIENCE = 60.0  # seconds, after which somebody should know what a measurement waits for


@dataclass
class Job:
    """One set of shards: a trial that needs it, and the shards to make."""

    trial: ResolvedTrial
    folder: ShardFolder
    faults: dict[int, str]

    @property
    def name(self) -> str:
        return f"{self.folder.header['data']['task']}/{self.folder.header['data']['split']}"

    def images(self, index: int) -> int:
        return self.folder.sizes[index]


def staging_jobs(plan: Plan) -> list[Job]:
    """All sets of shards that a sweep needs, each once."""
    jobs: dict[str, Job] = {}
    for trial in plan.staged():
        for _, folder in plan.context(trial).needed_shards.values():
            if folder.key not in jobs:
                jobs[folder.key] = Job(trial, folder, folder.faults())
    return list(jobs.values())


def stage(plan: Plan, jobs: list[Job]) -> None:
    """Makes what is missing, one Ray task a shard, and then every manifest.

    Ray repeats tasks whose worker or node was lost; what was lost after it was made is found and made again.

    Raises:
        UserError: a shard that cannot be made, with its cause.
    """
    resources, made = plan.sweep.config.resources, [job for job in jobs if job.faults]
    for job in made:
        report_faults(job.folder, job.faults)
    for _ in range(ROUNDS):
        wanted = [(job, index) for job in made for index in sorted(job.faults)]
        if not wanted:
            break
        _await({_submit(plan, job, index): (job, index) for job, index in wanted})
        for job in made:
            job.faults = job.folder.faults()
    for job in jobs:
        if job in made or not job.folder.complete():
            job.folder.finish(batch=batch_size_of(device_of(resources)), threads=num_threads(resources))


def _submit(plan: Plan, job: Job, index: int):
    from patchrank.tune.worker import score_one

    config = plan.sweep.config
    how = {"num_cpus": config.resources.cpu, "num_gpus": config.resources.gpu}
    task = score_one.options(name=f"score {job.name} shard {index}", **how)
    return task.remote(job.trial.config, config, job.folder.key, index)


def _await(waiting: dict) -> None:
    """Waits for all tasks, with a bar that counts images."""
    import ray

    total = sum(job.images(index) for job, index in waiting.values())
    with progress(total=total, desc="golden scores", unit="image", delay=0, smoothing=0.1) as bar:
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=1.0)
                for task in done:
                    job, index = waiting.pop(task)
                    _check(task, job, index)
                    bar.update(job.images(index))
        finally:  # where one has failed, or somebody asked for an end
            for task in waiting:
                ray.cancel(task)


def _check(task, job: Job, index: int) -> None:
    """Raises what a task ended with: bad input as itself, all else with the shard that it was about."""
    import ray

    try:
        ray.get(task)
    except ray.exceptions.RayError as error:
        if isinstance(getattr(error, "cause", None), UserError):
            raise error.cause from None
        what = f"shard {index} of {job.name} in {job.folder.path}"
        raise UserError(f"{what} cannot be made ({_cause(error)})") from None


def _cause(error: Exception) -> str:
    """What Ray says of a task that failed, in one line: what the task raised, or what became of its worker."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def measure_alone(trials: Sequence[ResolvedTrial], config: SweepConfig, check: Callable[[], None]) -> None:
    """Measures trials' structures one after the other, each on a node that Ray gives nobody else meanwhile.

    A line says so where one cannot be measured, and the others go on.

    Args:
        check: called before each; may raise to end it all.
    """
    import ray

    with progress(trials, desc="milliseconds", unit="tower", delay=0) as bar:
        for trial in bar:
            check()
            try:
                ray.get(_started(trial, config))
            except ray.exceptions.RayError as error:
                what = settings_key(speed_settings(trial))
                write_line(f"  milliseconds of {what} cannot be measured ({_cause(error)})")


def _started(trial: ResolvedTrial, config: SweepConfig):
    """A measurement under way; says so where its node is long in coming, since others have a part of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from patchrank.tune.worker import time_one

    node = _node(config.resources, ray.nodes())
    whole = {"num_cpus": node["Resources"].get("CPU", 1), "num_gpus": node["Resources"].get("GPU", 0)}
    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = time_one.options(scheduling_strategy=where, name=f"milliseconds of {config.name}", **whole)
    found = task.remote(trial.config, config)
    done, _ = ray.wait([found], timeout=PATIENCE)
    if not done:
        what = ", ".join(f"{key.removeprefix('num_')} {value:g}" for key, value in whole.items() if value)
        write_line(f"  waiting for all of node {node['NodeManagerAddress']} ({what}) to be free")
    return found


def _node(resources: Resources, nodes: list[dict]) -> dict:
    """The largest node that holds a trial; of equals the first by address, so that a later run takes the same."""

    def size(node: dict) -> tuple[float, float]:
        return node["Resources"].get("GPU", 0), node["Resources"].get("CPU", 0)

    alive = sorted((node for node in nodes if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    return max((n for n in alive if size(n)[0] >= resources.gpu and size(n)[1] >= resources.cpu), key=size)
