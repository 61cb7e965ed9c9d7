"""The prompts of a trial: tuned on the spot, or read from where an earlier trial left them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from patchrank.io import join
from patchrank.prompt.tuning import run_id, tune_prompts
from patchrank.trial.requirements import TrialContext


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
