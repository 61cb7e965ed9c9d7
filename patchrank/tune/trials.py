"""Trials on Ray Tune, which places them, takes back what was lost with a node, and reuses workers."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass

from patchrank.tune.interrupts import Interrupts
from patchrank.tune.plan import Plan
from patchrank.tune.progress import describe

RETRIES = 2  # of a trial whose worker or node was lost


@dataclass(frozen=True)
class Failure:
    """A trial that did not come to its end: its swept settings in words, and why."""

    settings: str
    cause: str


def run_trials(plan: Plan, count: int, slots: int, interrupts: Interrupts) -> dict[str, Failure]:
    """Runs up to `count` of the trials that are missing, `slots` at a time; returns those that failed, by id.

    Ray's own notes go to a temporary folder of this machine: records are what counts, wherever they lie.
    """
    from ray import tune

    from patchrank.tune.callback import Progress
    from patchrank.tune.search import create_search

    run = time.strftime("run-%Y%m%d-%H%M%S")
    progress, notes = Progress(plan, count, run), tempfile.mkdtemp(prefix="patchrank-")
    tuner = tune.Tuner(
        _trainable(plan, run),
        tune_config=tune.TuneConfig(
            search_alg=create_search(plan),
            num_samples=count,
            max_concurrent_trials=slots,
            reuse_actors=True,
            trial_name_creator=lambda trial: describe(trial.config["values"]),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=run,
            verbose=0,
            callbacks=[progress],
            storage_path=notes,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )
    try:
        with interrupts.told_to_tune():
            tuner.fit()
    finally:
        progress.bar.close()
        shutil.rmtree(notes, ignore_errors=True)
    return {identity: Failure(*failure) for identity, failure in progress.failures.items()}


def _trainable(plan: Plan, run: str):
    """Tune's trainable with all that a worker needs to know, under a name that a dashboard can show."""
    from ray import tune

    from patchrank.tune.worker import run_one

    config, resources = plan.sweep.config, plan.sweep.config.resources.model_dump()
    job = {"base": config.trial.model_dump(), "root": config.root, "shards": config.shards, "sweep": config.name}
    job |= {"run": run, "time_limit": config.time_limit, "imports": config.imports, **resources}
    trainable = tune.with_parameters(run_one, job=job)
    trainable.__name__ = f"trials of {config.name}"
    return tune.with_resources(trainable, resources)
