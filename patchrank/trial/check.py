"""A trial's settings against the registries, the tower's depth and grid, and the data, before anything starts."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from patchrank.config import DataConfig
from patchrank.fit import LOSSES
from patchrank.golden.scores import check_rounds
from patchrank.layers import pruning
from patchrank.layers.predictors import check_location
from patchrank.layers.prompts import PROMPTS
from patchrank.layers.schedule import check_locations
from patchrank.models.clip import Clip, create_tower
from patchrank.models.pretrained import surely_has_text
from patchrank.models.text import CONTEXT_LENGTH, tokenize
from patchrank.prompt.tuning import check_distillation
from patchrank.trial.inputs import load_part
from patchrank.trial.requirements import ResolvedTrial
from patchrank.utils.errors import UserError, near

MAX_TOKENS = CONTEXT_LENGTH - 10  # of prompts: what is left holds start, end and the name of a class


def check_trial(trial: ResolvedTrial) -> None:
    """Refuses settings that cannot run.

    Raises:
        UserError: names the setting, the rule it broke and what to try.
    """
    config = trial.config
    pair = _empty_pair(config.model.name, config.model.img_size)
    tower = pair.visual
    if config.predictor.fit_on == "others" and trial.is_fitted and len(trial.tasks) == 1:
        raise UserError(
            f"predictor.fit_on is 'others', but {trial.tasks[0]!r} is the only task; try own, or more tasks"
        )
    for key, tasks in (("data.tasks", trial.tasks), ("predictor.fit_on", trial.fit_tasks)):
        if len(set(tasks)) < len(tasks):
            raise UserError(f"{key} must not name a task twice, but is {list(tasks)}")
        for task in tasks:
            _check_task(task, config.data, surely_has_text(config.model.name))
    check_locations((trial.remove_at,), len(tower.blocks))
    pruning.windows(tower.patch_embed.grid_size, config.golden.window, config.golden.stride)
    check_rounds(config.golden.rounds, tower.num_patches)
    predictor = trial.predictor.create(tower)
    if trial.ranks_by_predictor:
        check_location(config.predictor.name, trial.location)
    if (loss := config.predictor.loss) not in LOSSES:
        raise UserError(f"predictor.loss {loss!r} does not exist; {near(loss, LOSSES)}")
    with pair.applied(predictor if trial.ranks_by_predictor else None, predictor_init="random", **trial.pruning):
        if trial.learns:
            _check_prompt(trial, tower)
    if config.controls and config.data.n_test == 0:
        raise UserError("controls are run on test images, which data.n_test 0 keeps out of sight; try controls=[]")


def counted_gmacs(trial: ResolvedTrial) -> float:
    """GMACs of one image with a trial's pruning, its ranking included and learned tokens left out; nothing is run."""
    pair, predictor = _empty_pair(trial.config.model.name, trial.config.model.img_size), None
    if trial.ranker is not None:
        with torch.device("meta"):
            predictor = trial.ranker.create(pair.visual)
    with pair.applied(predictor=predictor, **trial.pruning):
        return pair.visual.macs().image / 1e9


def _check_prompt(trial: ResolvedTrial, tower: nn.Module) -> None:
    """Checks what prompts ask of each other and of the pruning, which is in force on the tower."""
    prompt = trial.config.prompt
    PROMPTS.find(prompt.name)
    check_distillation(prompt, tower)
    if trial.is_oracle:
        raise UserError(
            "pruning.reducer 'golden' ranks images that were scored, and prompts learn from others; try predictor"
        )
    if trial.config.seed < 0:
        raise UserError(f"seed must be a whole number from 0 where prompts are tuned, but is {trial.config.seed}")
    if (number := prompt.num_tokens) is None:
        return
    if number > MAX_TOKENS:
        raise UserError(f"prompt.num_tokens is {number}, but must leave room for a class name; try {MAX_TOKENS}")
    if prompt.words is not None:
        count = int(tokenize([prompt.words])[0].argmax()) - 1  # without start and end
        if count != number:
            raise UserError(f"prompt.words {prompt.words!r} are {count} tokens, but prompt.num_tokens is {number}")


@lru_cache(maxsize=64)
def _check_task(task: str, data: DataConfig, has_text: bool) -> None:
    """Whether a task's images are there, of a model with a text tower with the labels that accuracy needs."""
    part = "val" if data.n_test == 0 else "test"
    split = load_part(task, part, data, 64)  # as many as a few broken images among them cannot spoil
    if not has_text:
        return
    if split.labels is None:
        raise UserError(
            f"data.tasks: {task!r} in {data.root} has no labels, and a trial measures accuracy; "
            "the stages golden, fit and evaluate need none"
        )
    if not split.classes:
        raise UserError(f"data.tasks: labels of {task!r} in {data.root} are numbers: name them by data.vocabulary")


@lru_cache(maxsize=4)
def _empty_pair(name: str, img_size: int | None) -> Clip:
    """A tower without weights to check settings against, in a pair without a text tower."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return Clip(name, create_tower(name, img_size=img_size), nn.Identity())
