"""Trials on Ray Tune, which places them, takes back what was lost with a node, and reuses workers."""

from __future__ import annotations

import tempfile
import time

from ray import tune
from ray.exceptions import OutOfMemoryError

from patchrank.tune.callback import Progress
from patchrank.tune.console import Failure, describe
from patchrank.tune.early_stopping import create_scheduler
from patchrank.tune.loggers import tracker_callbacks
from patchrank.tune.plan import Plan
from patchrank.tune.search import CellSearch
from patchrank.tune.signals import Interrupts
from patchrank.tune.worker import run_one


def run_trials(
    plan: Plan, count: int, slots: int, interrupts: Interrupts, failed: dict[str, Failure]
) -> dict[str, Failure]:
    """Runs up to `count` of the trials that are missing, `slots` at a time; returns those that failed, by id.

    A trial whose worker or node was lost comes round again once the others are done, in a Tune of its own: Tune's own
    retries are used up before Ray has noticed that a node is gone, and Tune comes to an end itself where Ray kills a
    worker for the memory that it took.

    Args:
        failed: what has failed before in this run of the driver, and has had its turn.
    """
    progress = Progress(plan, count, time.strftime("run-%Y%m%d-%H%M%S"), failed, interrupts)
    with progress.bar:
        while progress.next_round() and not interrupts.happened:
            try:
                _fit(plan, progress, 1 if progress.one_at_a_time else slots, interrupts)
            except RuntimeError as error:
                if not isinstance(error.__cause__, OutOfMemoryError):
                    raise
                progress.out_of_memory(str(error.__cause__))
            plan.records.refresh()
    return progress.failures


def _fit(plan: Plan, progress: Progress, slots: int, interrupts: Interrupts) -> None:
    """One Tune. Ray's own notes go to a temporary folder of this machine: records count, wherever they lie."""
    config = plan.sweep.config
    trainable = tune.with_parameters(run_one, sweep=config, run=progress.run)
    trainable.__name__ = f"trials of {config.name}"  # which a dashboard shows
    trainable = tune.with_resources(trainable, config.resources.model_dump())
    how = tune.TuneConfig(
        search_alg=CellSearch(plan, progress.failures, progress.lost),
        scheduler=create_scheduler(config.search.asha, map(plan.context, plan.staged())),
        num_samples=progress.left,
        max_concurrent_trials=slots,
        reuse_actors=True,
        trial_name_creator=lambda trial: describe(trial.config["values"]),
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
    callbacks = [progress, *tracker_callbacks(config.loggers, config.name)]
    with tempfile.TemporaryDirectory(prefix="patchrank-", ignore_cleanup_errors=True) as notes:
        where = tune.RunConfig(name=progress.run, verbose=0, callbacks=callbacks, storage_path=notes)
        with interrupts.told_to_tune():
            tune.Tuner(trainable, tune_config=how, run_config=where).fit()
