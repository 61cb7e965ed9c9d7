"""The prompts of a trial: tuned on the spot, or read from where an earlier trial left them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from patchrank.config import TrialConfig
from patchrank.data.images import ImageSplit
from patchrank.errors import UserError
from patchrank.files import content_id, join
from patchrank.inputs import Inputs, templates_of
from patchrank.models.text import tokenize
from patchrank.prompting.presets import complete
from patchrank.prompting.shots import load_train
from patchrank.prompting.tuning import check_distillation, run_id, seen, tune_prompts


def learns(trial: TrialConfig) -> bool:
    """Whether a trial tunes prompts."""
    return trial.prompt is not None and trial.prompt.mode != "none"


def check_prompt(trial: TrialConfig, tower: nn.Module) -> None:
    """Checks what a trial's prompts ask of each other and of its pruning, before anything starts.

    Raises:
        UserError: distillation where nothing is pruned, or words that are not as many tokens as there are to be.
    """
    config = trial.prompt
    check_distillation(config, tower)
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
    """What decides on which images those are, beside model and data."""
    return [trial.prompt.loss, trial.prompt.shots, trial.prompt.images, trial.seed] if learns(trial) else None


def lessons_id(trial: TrialConfig, inputs: Inputs) -> dict[str, str]:
    """Fingerprint of those images, {} for a trial without prompts."""
    if not learns(trial):
        return {}
    splits = [lessons(trial, task, inputs) for task in trial.data.tasks]
    return {"lessons": content_id([[each.ids_sha256(), each.labels, each.classes] for each in splits])}


@contextmanager
def prompted(trial: TrialConfig, task: str, inputs: Inputs, shards: str, quiet: bool) -> Iterator[dict[str, int]]:
    """The pair with a trial's prompts for the length of a block; yields what these have seen, {} without any.

    The pruning of the trial must be in force.
    """
    if not learns(trial):
        yield {}
        return
    clip, config = inputs.clip, complete(trial.prompt, inputs.clip, task)
    train, val = lessons(trial, task, inputs), inputs.split(task, "val")
    path = join(shards, "prompts", f"{run_id(clip, train, val, config, trial.seed)[:16]}.safetensors")
    clip.set_prompts(tune_prompts(clip, train, val, config, trial.seed, path, quiet=quiet).prompts)
    try:
        found = seen(train, val, config)
        yield {"n_seen_images": found["images"], "n_seen_labels": found["labels"]}
    finally:
        clip.set_prompts(None)
