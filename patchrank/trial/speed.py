"""Milliseconds of a trial's tower: which settings decide them, and the file that they are kept in."""

from __future__ import annotations

import datetime

import timm
import torch
from torch import nn

from patchrank.benchmark import measure
from patchrank.config import BenchmarkConfig, TrialConfig
from patchrank.io import content_id, join, read_json, write_json
from patchrank.layers.norm_gains import layer_norms
from patchrank.layers.predictors import create_predictor
from patchrank.layers.prompts import Prompts
from patchrank.models.clip import create_clip
from patchrank.prompt.presets import complete
from patchrank.trial.ranking import predictor_shape
from patchrank.utils.device import check_device, hardware

SCHEMA = 1
VERSION = 1  # of the measurement: bump it when the same tower would get other milliseconds


def speed_settings(trial: TrialConfig) -> dict:
    """What of a trial decides how long an image takes, and nothing else: no weights, data, seed or way of fitting."""
    pruning, ranked = trial.pruning.model_dump(), None
    if pruning["drop_counts"] is not None:
        del pruning["keep_rate"]  # which they win over
    if trial.pruning.keep_rate == 1 and trial.pruning.drop_counts is None:
        pruning = None
    elif trial.pruning.reducer == "predictor":
        ranked = {"name": trial.predictor.name, **predictor_shape(trial)}
    return {"model": trial.model.name, "pruning": pruning, "predictor": ranked, "prompts": _inserted(trial)}


def _inserted(trial: TrialConfig) -> dict | None:
    """Learned tokens that an image carries through the tower, and gains that its norms take; text is embedded once."""
    prompt = trial.prompt
    if prompt is None or "V" not in prompt.mode:
        return None
    known = ("num_tokens",) if prompt.num_tokens is not None else ("mode", "loss", "preset", "words")
    return {key: getattr(prompt, key) for key in (*known, "norm_gains")}


def speed_id(trial: TrialConfig, hardware: dict, benchmark: BenchmarkConfig) -> str:
    """Names a measurement by all that milliseconds depend on; trials that differ in other things share it."""
    what = {"settings": speed_settings(trial), "hardware": hardware, "benchmark": benchmark.model_dump()}
    return content_id(what | {"schema": SCHEMA, "version": VERSION})


def measure_trial(trial: TrialConfig, device: str, benchmark: BenchmarkConfig, folder: str) -> dict:
    """A trial's milliseconds on this machine: read from `<folder>/<speed_id>.json`, or measured and written there.

    Weights do not change speed, so the tower's are random. Nothing else should run on the machine meanwhile, and
    torch's threads must be set before.

    Raises:
        UserError: an oracle, or a device that is not there.
    """
    machine = hardware(device)
    identity = speed_id(trial, machine, benchmark)
    path = join(folder, f"{identity}.json")
    known = read_json(path)
    if known is not None and known.get("id") == identity:
        return known
    check_device(device)
    record = {"schema": SCHEMA, "version": VERSION, "id": identity, "hardware": machine}
    record["settings"] = speed_settings(trial)
    record |= {"benchmark": benchmark.model_dump(), "date": f"{datetime.date.today()}"}
    record |= measure(random_tower(trial, device), benchmark.batch_size, benchmark.repeats)
    write_json(path, record)
    return record


def random_tower(trial: TrialConfig, device: str = "cpu") -> nn.Module:
    """A tower of a trial's structure with random weights, its ranker and its learned tokens among them."""
    with torch.random.fork_rng(devices=[]):
        tower, how = timm.create_model(trial.model.name).eval(), {}
        if trial.pruning.reducer == "predictor":
            name, grid = trial.predictor.name, tower.patch_embed.grid_size
            how["predictor"] = create_predictor(name, tower.embed_dim, grid, **predictor_shape(trial)).eval()
        tower.set_pruning(predictor_init="random", seed=trial.seed, **trial.pruning.model_dump(), **how)
        tower.to(device)
        if _inserted(trial) is not None:
            tower.set_prompts(_random_prompts(trial, tower).to(device))
    return tower


def _random_prompts(trial: TrialConfig, tower: nn.Module) -> Prompts:
    clip = create_clip(trial.model.name, pretrained=False)  # whose text tower tells how many tokens words are
    config = complete(trial.prompt, clip, trial.data.tasks[0])
    gains = len(layer_norms(tower)) if config.norm_gains else 0
    return Prompts("V", config.num_tokens, clip.text.width, tower.embed_dim, num_norms=gains)
