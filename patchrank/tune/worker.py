"""What runs inside Ray's workers: one trial, the scoring of one shard, or the timing of one tower."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import ray
import torch
from ray import tune

from patchrank.config import SweepConfig, TrialConfig
from patchrank.golden.make_shards import score_shard
from patchrank.io import exists, join, write_json
from patchrank.trial.identity import trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import new_record, run_trial
from patchrank.trial.speed import measure_trial
from patchrank.tune.early_stopping import reporting
from patchrank.tune.marks import marked
from patchrank.tune.prometheus import count_shard
from patchrank.tune.records import find_outcome
from patchrank.tune.space import configure
from patchrank.utils.errors import StoreError, UserError
from patchrank.utils.plugins import import_modules

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
            with (
                marked(sweep.root, sweep.name, identity, config["values"]) as mark,
                time_limit(sweep, trial, identity, run),
            ):
                steps = reporting(sweep.search.asha) if sweep.search.asha is not None else None
                how = {"quiet": True, "steps": steps, "pulse": mark.pulse}
                record = run_trial(trial, context.inputs, sweep.root, sweep.shards, sweep.name, **how)
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
def score_one(trial: TrialConfig, sweep: SweepConfig, key: str, index: int) -> int | None:
    """Makes one shard of a folder, and returns how many sequences ran at a time; None if an earlier attempt made it."""
    _prepare(sweep)
    context = _context(ResolvedTrial(trial), sweep)
    found = {folder.key: (split, folder) for split, folder in context.needed_shards.values()}
    if key not in found:
        raise UserError("the images or weights of this node are not those of the driver")
    split, folder = found[key]
    if not folder.fault(index):
        return None
    began = time.perf_counter()
    batch_size = score_shard(context.inputs.clip, split, folder, index)
    count_shard(folder, index, time.perf_counter() - began)
    return batch_size


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
