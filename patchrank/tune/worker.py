"""What runs inside Ray's workers: one trial, the scoring of one shard, or the timing of one tower.

Below stands how the driver sends off shards, which come first, and timing, which comes last; `tuner` sends trials.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import ray
import torch
from ray import tune
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from patchrank.config import SweepConfig, TrialConfig
from patchrank.golden.make_shards import report_faults, score_shard
from patchrank.golden.scores import batch_size_of
from patchrank.io import exists, join, write_json
from patchrank.trial.identity import speed_settings, trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import new_record, run_trial
from patchrank.trial.speed import measure_trial
from patchrank.tune.early_stopping import reporting
from patchrank.tune.plan import Job, Plan
from patchrank.tune.prometheus import count_shard
from patchrank.tune.records import find_outcome, settings_key
from patchrank.tune.space import configure
from patchrank.utils.errors import StoreError, UserError
from patchrank.utils.plugins import import_modules
from patchrank.utils.progress import progress, write_line

ROUNDS = 3  # looks at what there is, of which a node that was lost may have taken some
PATIENCE = 60.0  # seconds, after which somebody should know what a measurement waits for

_load = lru_cache(maxsize=1)(load_inputs)


def run_one(config: dict, sweep: SweepConfig, run: str) -> None:
    """Tune's trainable: `config["values"]` are settings that replace those of the sweep's trial.

    The record is written before Tune hears of the result. A trial that fails reports why and does not raise: Tune is to
    try again where a worker or its node was lost, and not where the same would happen again.

    Args:
        run: name of the driver's run, whose next attempt at a trial hears what an earlier one ended with.
    """
    try:
        _prepare(sweep)
        trial = configure(sweep.trial, config["values"])
        context = _context(trial, sweep)
        identity = trial_id(context)
        found = find_outcome(sweep.root, identity, run)
        if found is None:
            with time_limit(sweep, trial, identity, run):
                steps = reporting(sweep.search.asha) if sweep.search.asha is not None else None
                record = run_trial(trial, context.inputs, sweep.root, sweep.shards, sweep.name, quiet=True, steps=steps)
            found = record["metrics"] | {"id": identity}
    except Exception as error:
        found = {"failure": f"{type(error).__name__}: {error}"}
    tune.report(found)


@contextmanager
def time_limit(sweep: SweepConfig, trial: ResolvedTrial, identity: str, run: str) -> Iterator[None]:
    """Ends the whole worker, with a record that says why, if the block takes longer than the sweep allows.

    A hung call cannot be interrupted, so nothing less would do.
    """
    seconds, path = sweep.time_limit, join(sweep.root, "trials", identity)
    if seconds is None:
        yield
        return

    def end() -> None:
        if exists(f"{path}.stopped.json"):  # the trial has ended, and Ray merely keeps its thread waiting
            return
        reason = f"TimeoutError: ran longer than time_limit = {seconds:g} seconds"
        try:
            write_json(f"{path}.error.json", new_record(trial, identity, sweep.name, "error", error=reason, run=run))
        finally:
            os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# max_calls: a worker keeps its model from shard to shard, on GPUs too
@ray.remote(max_retries=2, retry_exceptions=[OSError, StoreError], max_calls=0)
def score_one(trial: TrialConfig, sweep: SweepConfig, key: str, index: int) -> None:
    """Makes one shard of a folder, if no earlier attempt has."""
    _prepare(sweep)
    context = _context(ResolvedTrial(trial), sweep)
    found = {folder.key: (split, folder) for split, folder in context.needed_shards.values()}
    if key not in found:
        raise UserError("the images or weights of this node are not those of the driver")
    split, folder = found[key]
    if folder.fault(index):
        began = time.perf_counter()
        score_shard(context.inputs.clip, split, folder, index)
        count_shard(folder, index, time.perf_counter() - began)


@ray.remote(max_retries=2, max_calls=0)
def time_one(trial: TrialConfig, sweep: SweepConfig) -> None:
    """Milliseconds of a trial's structure on this node, which has been cleared for it."""
    _prepare(sweep)
    measure_trial(ResolvedTrial(trial), sweep.resources.device, sweep.benchmark, join(sweep.root, "speeds"))


def _prepare(sweep: SweepConfig) -> None:
    """Gives torch the threads that a trial takes, and registers the user's own components."""
    torch.set_num_threads(sweep.resources.num_threads)
    import_modules(sweep.imports)


def _context(trial: ResolvedTrial, sweep: SweepConfig) -> TrialContext:
    """A trial with its model and data, which are kept for the next one if it has the same."""
    inputs = _load(trial.config.model, trial.config.data, sweep.resources.device, join(sweep.shards, "heads"))
    return TrialContext(trial, inputs, sweep.shards)


def stage(plan: Plan, jobs: list[Job]) -> None:
    """Makes what is missing, one Ray task a shard, and then every manifest.

    Ray repeats tasks whose worker or node was lost; what was lost after it was made is found and made again.

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
        _await(waiting)
        for job in made:
            job.faults = job.folder.faults()
    for job in jobs:
        if job in made or not job.folder.complete():
            job.folder.finish(batch=batch_size_of(resources.device), threads=resources.num_threads)


def _await(waiting: dict[ray.ObjectRef, tuple[Job, int]]) -> None:
    """Waits for all tasks, each with its job and shard, with a bar that counts images."""
    total = sum(job.folder.sizes[index] for job, index in waiting.values())
    with progress(total=total, desc="golden scores", unit="image", delay=0, smoothing=0.1) as bar:
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=1.0)
                for task in done:
                    job, index = waiting.pop(task)
                    try:
                        ray.get(task)
                    except RayError as error:
                        if isinstance(getattr(error, "cause", None), UserError):  # bad input speaks for itself
                            raise error.cause from None
                        what = f"shard {index} of {job.name} in {job.folder.path}"
                        raise UserError(f"{what} cannot be made ({_cause(error)})") from None
                    bar.update(job.folder.sizes[index])
        finally:  # where one has failed, or somebody asked for an end
            for task in waiting:
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
