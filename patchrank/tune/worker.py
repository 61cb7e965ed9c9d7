"""What runs inside Ray's workers: one trial, or the scoring of a few shards."""

from __future__ import annotations

import json
from functools import lru_cache

import ray
import torch
from ray import tune

from patchrank.config import TrialConfig
from patchrank.files import join
from patchrank.golden import score_shard
from patchrank.inputs import Inputs, load_inputs
from patchrank.trial import needed_shards, run_trial
from patchrank.tune.plan import configure


def run_one(config: dict, base: dict, root: str, shards: str, sweep: str, cpu: float, gpu: float) -> None:
    """Tune's trainable: `config["values"]` are settings that replace those of the trial `base`.

    The record is written before Tune hears of the result.
    """
    torch.set_num_threads(max(1, int(cpu)))
    trial = configure(TrialConfig.model_validate(base), config["values"])
    inputs = _inputs(trial.model_dump_json(), _device(gpu), shards)
    record = run_trial(trial, inputs, root, shards, sweep, quiet=True)
    tune.report(record["metrics"])


@ray.remote(max_retries=2, retry_exceptions=[OSError])
def score_some(trial: dict, shards: str, key: str, indices: list[int], cpu: float, gpu: float) -> int:
    """Makes some shards of one folder; returns how many."""
    torch.set_num_threads(max(1, int(cpu)))
    config = TrialConfig.model_validate(trial)
    inputs = _inputs(config.model_dump_json(), _device(gpu), shards)
    split, folder = next(pair for pair in needed_shards(config, inputs, shards).values() if pair[1].key == key)
    for index in indices:
        score_shard(inputs.clip, split, folder, index)
    return len(indices)


@lru_cache(maxsize=1)
def _loaded(model_and_data: str, device: str, shards: str) -> Inputs:
    return load_inputs(TrialConfig.model_validate_json(model_and_data), device, heads=join(shards, "heads"))


def _inputs(trial: str, device: str, shards: str) -> Inputs:
    """Model and data of a trial; kept for the next one if it has the same."""
    raw = json.loads(trial)
    return _loaded(json.dumps({key: raw[key] for key in ("model", "data")}, sort_keys=True), device, shards)


def _device(gpu: float) -> str:
    return "cuda" if gpu else "cpu"
