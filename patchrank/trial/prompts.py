"""The prompts of a trial: tuned on the spot, or read from where an earlier trial left them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from patchrank.config import TrialConfig
from patchrank.data.image_split import ImageSplit
from patchrank.io import content_id, join
from patchrank.layers.prompts import PROMPTS
from patchrank.models.text import CONTEXT_LENGTH, tokenize
from patchrank.prompt.batches import load_train
from patchrank.prompt.presets import complete
from patchrank.prompt.tuning import check_distillation, recipe, run_id, tune_prompts
from patchrank.trial.epochs import Steps, listener
from patchrank.trial.inputs import Inputs, templates_of
from patchrank.utils.errors import UserError

MAX_TOKENS = CONTEXT_LENGTH - 10  # what is left holds start, end and the name of a class


class Learned(NamedTuple):
    """Ids of the images that prompts were tuned on, and of those among them whose labels were read."""

    images: set[str]
    labels: set[str]


def learns(trial: TrialConfig) -> bool:
    """Whether a trial tunes prompts."""
    return trial.prompt is not None and trial.prompt.mode != "none"


def check_prompt(trial: TrialConfig, tower: nn.Module) -> None:
    """Checks what a trial's prompts ask of each other and of its pruning, before anything starts.

    Raises:
        UserError: a prompt layer that is not registered, distillation where nothing is pruned, a ranking by oracles,
            a seed below 0, more tokens than leave room for a class name, or words that are not as many tokens as
            there are to be.
    """
    config = trial.prompt
    PROMPTS.find(config.name)
    check_distillation(config, tower)
    if trial.pruning.reducer == "golden":
        raise UserError(
            "pruning.reducer 'golden' ranks images that were scored, and prompts learn from others; near: predictor"
        )
    if trial.seed < 0:
        raise UserError(f"seed must be a whole number from 0 where prompts are tuned, but is {trial.seed}")
    if (config.num_tokens or 0) > MAX_TOKENS:
        raise UserError(
            f"prompt.num_tokens is {config.num_tokens}, but must leave room for a class name; near: {MAX_TOKENS}"
        )
    if config.words is None or config.num_tokens is None:
        return
    count = int(tokenize([config.words])[0].argmax()) - 1  # without start and end
    if count != config.num_tokens:
        raise UserError(
            f"prompt.words {config.words!r} are {count} tokens, but prompt.num_tokens is {config.num_tokens}"
        )


def lessons(trial: TrialConfig, task: str, inputs: Inputs) -> ImageSplit:
    """The images that a trial's prompts are tuned on."""
    config, data = complete(trial.prompt, inputs.clip, task), trial.data
    where = (data.root, data.vocabulary, templates_of(data))
    key = ("lessons", task, config.loss, config.shots, config.images, trial.seed)
    return inputs.once(key, lambda: load_train(task, config, trial.seed, *where))


def lessons_key(trial: TrialConfig) -> list | None:
    """What decides on `lessons_id`, beside model and data."""
    return [trial.prompt.model_dump(), trial.seed] if learns(trial) else None


def lessons_id(trial: TrialConfig, inputs: Inputs) -> dict[str, str]:
    """Fingerprint of those images, and of what a preset fills in; {} for a trial without prompts."""
    if not learns(trial):
        return {}
    splits = [lessons(trial, task, inputs) for task in trial.data.tasks]
    images = [[each.ids_sha256(), each.labels, each.classes] for each in splits]
    settings = [recipe(complete(trial.prompt, inputs.clip, task)) for task in trial.data.tasks]
    return {"lessons": content_id([images, settings])}


def num_epochs(trial: TrialConfig, inputs: Inputs) -> int:
    """How many epochs of tuning a trial has in all, if it finds no prompts and nothing stops it early."""
    if not learns(trial):
        return 0
    return sum(complete(trial.prompt, inputs.clip, task).epochs for task in trial.data.tasks)


@contextmanager
def prompted(
    trial: TrialConfig, task: str, inputs: Inputs, shards: str, quiet: bool, steps: Steps | None = None
) -> Iterator[Learned | None]:
    """The pair with a trial's prompts for the length of a block; yields what these have seen, None without any.

    The pruning of the trial must be in force.
    """
    if not learns(trial):
        yield None
        return
    clip, config = inputs.clip, complete(trial.prompt, inputs.clip, task)
    train, val = lessons(trial, task, inputs), inputs.reference(task, "val").split
    path = join(shards, "prompts", f"{run_id(clip, train, val, config, trial.seed)[:16]}.safetensors")
    hear = listener(steps, "prompt", config.epochs * trial.data.tasks.index(task))
    clip.set_prompts(tune_prompts(clip, train, val, config, trial.seed, path, quiet=quiet, after_epoch=hear).prompts)
    try:
        images = {*train.ids, *(val.ids if config.patience is not None else ())}
        yield Learned(images, set() if config.loss == "distill" else images)
    finally:
        clip.set_prompts(None)
