"""What runs inside Ray's workers: one trial, or the scoring of one shard."""

from __future__ import annotations

import json
import time
from functools import lru_cache

import ray
import torch
from ray import tune

from patchrank.config import AshaConfig, BenchmarkConfig, TrialConfig
from patchrank.golden.make_shards import score_shard
from patchrank.golden.shards import ShardFolder
from patchrank.io import join
from patchrank.layers.pruning import windows
from patchrank.trial.inputs import Inputs, load_inputs
from patchrank.trial.run import fingerprint, needed_shards, run_trial, trial_id
from patchrank.trial.speed import measure_trial
from patchrank.tune.early_stopping import reporting
from patchrank.tune.limits import find_outcome, time_limit
from patchrank.tune.prometheus import count_shard
from patchrank.tune.space import configure
from patchrank.utils.errors import StoreError, UserError
from patchrank.utils.plugins import import_modules


def run_one(config: dict, job: dict) -> None:
    """Tune's trainable: `config["values"]` are settings that replace those of the trial `job["base"]`.

    The record is written before Tune hears of the result. A trial that fails reports why and does not raise: Tune is to
    try again where a worker or its node was lost, and not where the same would happen again.
    """
    torch.set_num_threads(max(1, int(job["cpu"])))
    try:
        found = _run(config["values"], job)
    except Exception as error:
        found = {"failure": f"{type(error).__name__}: {error}"}
    tune.report(found)


def _run(values: dict, job: dict) -> dict:
    """Metrics of a trial with its id, or the failure that an earlier attempt of the same run ended with."""
    root, shards = job["root"], job["shards"]
    import_modules(job["imports"])
    trial = configure(TrialConfig.model_validate(job["base"]), values)
    inputs = _inputs(trial.model_dump_json(), _device(job["gpu"]), shards)
    identity = trial_id(trial, fingerprint(trial, inputs))
    known = find_outcome(root, identity, job["run"])
    if known is not None:
        return known
    with time_limit(job["time_limit"], root, trial, identity, job["sweep"], job["run"]):
        steps = reporting(AshaConfig(**job["asha"])) if job["asha"] else None
        record = run_trial(trial, inputs, root, shards, job["sweep"], quiet=True, steps=steps)
    return record["metrics"] | {"id": identity}


# max_calls: a worker keeps its model from shard to shard, on GPUs too
@ray.remote(max_retries=2, retry_exceptions=[OSError, StoreError], max_calls=0)
def score_one(trial: dict, shards: str, key: str, index: int, job: dict) -> None:
    """Makes one shard of a folder, if no earlier attempt has."""
    torch.set_num_threads(max(1, int(job["cpu"])))
    import_modules(job["imports"])
    config = TrialConfig.model_validate(trial)
    inputs = _inputs(config.model_dump_json(), _device(job["gpu"]), shards)
    found = [pair for pair in needed_shards(config, inputs, shards).values() if pair[1].key == key]
    if not found:
        raise UserError("the images or weights of this node are not those of the driver")
    split, folder = found[0]
    if folder.fault(index):
        began = time.perf_counter()
        score_shard(inputs.clip, split, folder, index)
        _count(folder, index, time.perf_counter() - began)


def _count(folder: ShardFolder, index: int, seconds: float) -> None:
    """Tells Ray's metrics of a shard that has been made."""
    about, golden = folder.header, folder.header["golden"]
    squares = len(windows(tuple(about["grid"]), golden["window"], golden["stride"]))
    passes = 1 + (golden["rounds"] - 1) * len(about["metrics"])
    images = folder.sizes[index]
    task, size = f"{about['data']['task']}/{about['data']['split']}", folder.record(index)["bytes"]
    count_shard(task, images, images * squares * passes, seconds, size)


@ray.remote(max_retries=2, max_calls=0)
def time_one(trial: dict, benchmark: dict, folder: str, job: dict) -> None:
    """Milliseconds of a trial's structure on this node, which has been cleared for it."""
    torch.set_num_threads(max(1, int(job["cpu"])))
    import_modules(job["imports"])
    measure_trial(TrialConfig.model_validate(trial), job["device"], BenchmarkConfig(**benchmark), folder)


@lru_cache(maxsize=1)
def _loaded(model_and_data: str, device: str, shards: str) -> Inputs:
    return load_inputs(TrialConfig.model_validate_json(model_and_data), device, heads=join(shards, "heads"))


def _inputs(trial: str, device: str, shards: str) -> Inputs:
    """Model and data of a trial; kept for the next one if it has the same."""
    raw = json.loads(trial)
    return _loaded(json.dumps({key: raw[key] for key in ("model", "data")}, sort_keys=True), device, shards)


def _device(gpu: float) -> str:
    return "cuda" if gpu else "cpu"
