"""How prompts are tuned by default: CoOp's and MaPLe's settings, two sets of ours, and learning rates."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from patchrank.config import PromptConfig
from patchrank.data.dataset_factory import find_task
from patchrank.layers.prompts import PROMPTS
from patchrank.models.clip import Clip

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of SGD, in CoOp and MaPLe
WARM_UP = 1e-5  # the learning rate of the first epoch, in both
FEW_PATCHES = 100  # on smaller grids 16 visual tokens would undo the pruning
IMAGES = 1024  # how many distillation learns from


class Preset(NamedTuple):
    lr: float
    batch_size: int
    epochs: int
    optimizer: Literal["sgd", "adam"] = "sgd"
    words: str | None = None  # whose embeddings the tokens start from


PRESETS = {
    "coop": Preset(2e-3, 32, 50),
    "maple": Preset(3.5e-3, 4, 5),
    "digits": Preset(0.1, 4, 15, words="a photo of the"),  # the embedded towers are 64 wide: more and longer steps
    "distill": Preset(3e-3, 16, 8, optimizer="adam"),
}


def learning_rates(lr: float, epochs: int) -> list[float]:
    """The rate of each epoch: one of warm-up, then a cosine whose counter starts after it, so it never reaches 0."""
    return [WARM_UP] + [lr * (1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs - 1)]


def complete(config: PromptConfig, clip: Clip, task: str) -> PromptConfig:
    """The same settings, with values in place of every None that a preset or the tower decides on.

    The preset is `distill` for that loss, `coop` where text alone is learned, `digits` for the embedded pair, and else
    `maple`; words to start from tell how many tokens there are.

    Raises:
        UserError: a prompt layer that is not registered.
    """
    PROMPTS.find(config.name)
    if config.preset is not None:
        name = config.preset
    elif config.loss == "distill":
        name = "distill"
    elif config.mode == "T":
        name = "coop"
    else:
        name = "digits" if clip.name.split(".")[0] == "patchrank_clip_digits" else "maple"
    preset, words = PRESETS[name], config.words
    if words is None and config.num_tokens is None:
        words = preset.words
    if words is None:
        num_tokens = 4 if clip.visual.num_patches < FEW_PATCHES else 16
    else:
        num_tokens = len(clip.embed_words(words))
    values = {"preset": name, "words": words, "num_tokens": num_tokens, "images": IMAGES}
    values |= {"augment": not find_task(task).embedded}
    values |= {key: getattr(preset, key) for key in ("lr", "batch_size", "epochs")}
    return config.model_copy(update={key: value for key, value in values.items() if getattr(config, key) is None})
