"""The ranking, repair and prompts of a trial: made on the spot, or read from where an earlier trial left them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from torch import nn

from patchrank.fit import describe, fit_predictor
from patchrank.golden.agreement import matching_on, prior_of, rank_quality
from patchrank.golden.dataset import Ranked, pooled, read_ranked
from patchrank.io import join
from patchrank.layers.predictors import load_predictor, save_predictor
from patchrank.models.repair_files import load_repair, save_repair
from patchrank.prompt.tuning import run_id, tune_prompts
from patchrank.repair import fit_repair, repair_id
from patchrank.trial.identity import ranker_id
from patchrank.trial.requirements import TrialContext
from patchrank.utils.errors import StoreError, UserError


@contextmanager
def ranked(context: TrialContext, task: str) -> Iterator[dict[str, np.ndarray]]:
    """The pair with a trial's pruning for the length of a block; what ranks is fitted before, if it has to be.

    Yields how well the ranking agrees with the golden one on val, by measure, (n,) each; {} where nothing is fitted.
    The shards that the trial reads must be there.
    """
    trial, inputs, predictor, quality = context.trial, context.inputs, None, {}
    if trial.is_fitted:
        own = trial.fitted_on(task)
        name = ranker_id(trial, [context.path(each, "train").rsplit("/", 1)[-1] for each in own])
        train = pooled([_read(context, each, "train") for each in own])
        predictor = _fitted(context, task, train, join(context.shards, "predictors", f"{name}.safetensors"))
        val, key = _read(context, task, "val"), (name, context.path(task, "val"))
        quality = inputs.once(key, lambda: rank_quality(predictor, prior_of(train), val))
    with inputs.clip.applied(predictor=predictor, **trial.pruning):
        yield quality


def describe_ranker(context: TrialContext) -> dict:
    """What the file of a trial's ranker says about itself."""
    trial, ranker = context.trial, context.trial.ranker
    return describe(context.inputs.clip, ranker.name, trial.location, trial.config.golden.metric, **ranker.shape)


def _read(context: TrialContext, task: str, part: str) -> Ranked:
    """Tokens and golden scores of a part of a task's data."""
    inputs, location, metric = context.inputs, context.trial.location, context.trial.config.golden.metric
    path = context.path(task, part)  # which names what the folder holds
    return inputs.once(
        (path, metric, location), lambda: read_ranked(inputs.clip, path, metric, location, context.quiet)
    )


def _fitted(context: TrialContext, task: str, train: Ranked, path: str) -> nn.Module:
    """The ranker of a task, from its file if one was fitted to the same shards in the same way. Priors have no file."""
    clip, ranker, config = context.inputs.clip, context.trial.ranker, context.trial.config
    grid = clip.visual.patch_embed.grid_size
    if ranker.name == "prior":
        return fit_predictor(train, grid, "prior")
    try:
        return load_predictor(path)[0].to(clip.logit_scale.device)
    except StoreError:  # it may well be there
        raise
    except UserError:
        pass
    how = {"loss": config.predictor.loss, "epochs": config.predictor.epochs, "lr": config.predictor.lr}
    how |= {"seed": config.seed, "quiet": context.quiet, "after_epoch": _matching_listener(context, task)}
    predictor = fit_predictor(train, grid, ranker.name, **how, **ranker.shape)
    save_predictor(predictor, path, describe_ranker(context))
    return predictor


def _matching_listener(context: TrialContext, task: str) -> Callable[[int, nn.Module], None] | None:
    """What hears of each epoch of fitting; its value is matching on val, of all tasks that the predictor is for."""
    trial = context.trial
    tasks = (task,) if trial.fits_each_task else trial.tasks
    before = trial.fit_epochs * trial.tasks.index(task) if trial.fits_each_task else 0
    hear = context.listener("predictor", before)
    if hear is None:
        return None
    return lambda epoch, predictor: hear(
        epoch, lambda: float(np.mean([matching_on(predictor, _read(context, name, "val")) for name in tasks]))
    )


@contextmanager
def repaired(context: TrialContext, task: str) -> Iterator[set[str] | None]:
    """The pair with a trial's repair for the length of a block; it is solved before, or read if an earlier trial did.

    Yields the ids of the images that it was solved on, None without a repair. The pruning of the trial must be in
    force.
    """
    if not context.trial.repairs:
        yield None
        return
    clip, splits = context.inputs.clip, context.repair_images(task)
    with clip.applied(repair_path=repair_file(context, task)):
        yield {name for split in splits for name in split.ids}


def repair_file(context: TrialContext, task: str) -> str:
    """The file of the repair of the pruning in force, which is solved and written if it is not there."""
    clip, splits, ridge = context.inputs.clip, context.repair_images(task), context.trial.config.repair.ridge
    path = join(context.shards, "repairs", f"{repair_id(clip, splits, ridge)[:16]}.safetensors")
    try:
        load_repair(path)
    except StoreError:  # it may well be there
        raise
    except UserError:
        save_repair(fit_repair(clip, splits, ridge, context.quiet), path)
    return path


class Learned(NamedTuple):
    """Ids of the images that prompts were tuned on, and of those among them whose labels were read."""

    images: set[str]
    labels: set[str]


@contextmanager
def prompted(context: TrialContext, task: str) -> Iterator[Learned | None]:
    """The pair with a trial's prompts for the length of a block; yields what these have seen, None without any.

    The pruning of the trial must be in force.
    """
    trial, inputs = context.trial, context.inputs
    if not trial.learns:
        yield None
        return
    clip, recipe, seed = inputs.clip, context.recipes[task], trial.config.seed
    train, val = context.lessons(task), inputs.reference(task, "val").split
    path = join(context.shards, "prompts", f"{run_id(clip, train, val, recipe, seed)[:16]}.safetensors")
    hear = context.listener("prompt", recipe.epochs * trial.tasks.index(task))
    tuned = tune_prompts(clip, train, val, recipe, seed, path, quiet=context.quiet, after_epoch=hear)
    with clip.applied(prompts=tuned.prompts):
        images = {*train.ids, *(val.ids if recipe.patience is not None else ())}
        yield Learned(images, set() if recipe.loss == "distill" else images)
