"""Milliseconds of a trial's tower, and the file that they are kept in."""

from __future__ import annotations

import datetime

import timm
import torch
from torch import nn

from patchrank import benchmark
from patchrank.config import BenchmarkConfig
from patchrank.io import join, read_json, write_json
from patchrank.layers.norm_gains import layer_norms
from patchrank.layers.prompts import create_prompt
from patchrank.models.clip import create_clip
from patchrank.trial.identity import SCHEMA, speed_id, speed_settings
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.utils.device import check_device, hardware


def measure_trial(trial: ResolvedTrial, device: str, settings: BenchmarkConfig, folder: str) -> dict:
    """A trial's milliseconds on this machine: read from `<folder>/<speed_id>.json`, or measured and written there.

    Weights do not change speed, so the tower's are random. Nothing else should run on the machine meanwhile, and
    torch's threads must be set before.

    Raises:
        UserError: an oracle, or a device that is not there.
    """
    machine = hardware(device)
    identity = speed_id(trial, machine, settings)
    path = join(folder, f"{identity}.json")
    known = read_json(path)
    if known is not None and known.get("id") == identity:
        return known
    check_device(device)
    record = {"schema": SCHEMA, "version": benchmark.VERSION, "id": identity, "hardware": machine}
    record |= {"settings": speed_settings(trial), "benchmark": settings.model_dump()}
    record |= {"date": f"{datetime.date.today()}"}
    record |= benchmark.measure(random_tower(trial, device), settings.batch_size, settings.repeats)
    write_json(path, record)
    return record


def random_tower(trial: ResolvedTrial, device: str = "cpu") -> nn.Module:
    """A tower of a trial's structure with random weights, its ranker and its learned tokens among them."""
    with torch.random.fork_rng(devices=[]):
        model, predictor = trial.config.model, None
        tower = timm.create_model(model.name, img_size=model.img_size).eval()
        if trial.ranks_by_predictor:
            predictor = trial.predictor.create(tower).eval()
        tower.set_pruning(predictor, predictor_init="random", **trial.pruning)
        tower.to(device)
        if trial.learns_visual:
            clip = create_clip(
                model.name, pretrained=False, img_size=model.img_size
            )  # whose text tower counts tokens of words
            recipe = TrialContext(trial, Inputs(clip, trial.config.data)).recipes[trial.tasks[0]]
            widths, gains = (clip.text.width, tower.embed_dim), len(layer_norms(tower)) if recipe.norm_gains else 0
            tower.set_prompts(create_prompt(recipe.name, "V", recipe.num_tokens, *widths, num_norms=gains).to(device))
    return tower
