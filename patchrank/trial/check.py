"""A trial's settings against the registries, the tower's depth and grid, and the data, before anything starts."""

from __future__ import annotations

from functools import lru_cache

import timm
import torch

from patchrank import fit
from patchrank.config import DataConfig, TrialConfig
from patchrank.golden.scores import check_rounds
from patchrank.layers import pruning
from patchrank.layers.predictors import check_location, create_predictor
from patchrank.models.pretrained import find_weights
from patchrank.trial.inputs import load_part
from patchrank.trial.prompts import check_prompt, learns
from patchrank.trial.run import fit_tasks, is_fitted, predictor_shape, remove_at
from patchrank.utils.errors import UserError, near


def check_trial(trial: TrialConfig) -> None:
    """Checks a configuration against registries, depth and grid, before anything starts.

    Raises:
        UserError: names the setting, the rule it broke and the near alternative.
    """
    find_weights(trial.model.name)
    for key, tasks in (("data.tasks", trial.data.tasks), ("predictor.fit_on", fit_tasks(trial))):
        if len(set(tasks)) < len(tasks):
            raise UserError(f"{key} must not name a task twice, but is {tasks}")
        for task in tasks:
            _check_task(task, trial.data.model_dump_json())
    tower = _empty_tower(trial.model.name)
    pruning.check_locations((remove_at(trial),), len(tower.blocks))
    pruning.windows(tower.patch_embed.grid_size, trial.golden.window, trial.golden.stride)
    check_rounds(trial.golden.rounds, tower.num_patches)
    create_predictor(trial.predictor.name, tower.embed_dim, tower.patch_embed.grid_size, **predictor_shape(trial))
    if trial.pruning.reducer == "predictor":
        check_location(trial.predictor.name, trial.pruning.locations[0])
    if trial.predictor.loss not in fit.LOSSES:
        raise UserError(
            f"predictor.loss {trial.predictor.loss!r} does not exist; {near(trial.predictor.loss, fit.LOSSES)}"
        )
    tower.set_pruning(**trial.pruning.model_dump(), predictor_init="random")
    if trial.controls and trial.data.n_test == 0:
        raise UserError("controls are run on test images, which data.n_test 0 keeps out of sight; near: controls=[]")
    if learns(trial):
        check_prompt(trial, tower)


def counted_gmacs(trial: TrialConfig) -> float:
    """GMACs of one image with a trial's pruning, its ranking included and learned tokens left out; nothing is run."""
    tower, how = _empty_tower(trial.model.name), {}
    if is_fitted(trial):
        name = "prior" if trial.pruning.reducer == "prior" else trial.predictor.name
        shape = {} if name == "prior" else predictor_shape(trial)
        with torch.device("meta"):
            how["predictor"] = create_predictor(name, tower.embed_dim, tower.patch_embed.grid_size, **shape)
    tower.set_pruning(keep_rate=1.0, drop_counts=None)
    tower.set_pruning(**trial.pruning.model_dump(), **how)
    return tower.macs().image / 1e9


@lru_cache(maxsize=64)
def _check_task(task: str, data: str) -> None:
    """Whether a task's images are there, with the labels that accuracy needs."""
    config = DataConfig.model_validate_json(data)
    part = "val" if config.n_test == 0 else "test"
    split = load_part(task, part, config, 64)  # as many as a few broken images among them cannot spoil
    if split.labels is None:
        raise UserError(
            f"data.tasks: {task!r} in {config.root} has no labels, and a trial measures accuracy; "
            "the stages golden, fit and evaluate need none"
        )
    if not split.classes:
        raise UserError(f"data.tasks: labels of {task!r} in {config.root} are numbers: name them by data.vocabulary")


@lru_cache(maxsize=4)
def _empty_tower(name: str) -> torch.nn.Module:
    """A tower without content, to check settings against."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return timm.create_model(name)
