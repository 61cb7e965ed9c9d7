"""Few-shot draws that give CoOp's images exactly.

There is one random stream per seed: train is drawn first, then val. Classes are drawn in the order in which the list
meets them, not by label.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from numbers import Integral

from patchrank.data.coop import NAMED, load_named
from patchrank.data.image_split import ImageSplit
from patchrank.utils.errors import UserError, near

MAX_VAL_SHOTS = 4


def few_shot(
    train_labels: Sequence[int], val_labels: Sequence[int], shots: int, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the images that are drawn from train (`shots` per class) and from val (at most 4 per class).

    Args:
        train_labels: labels in the order of the split file, which decides what is drawn.
        val_labels: the same of val; empty where there is no val.

    Raises:
        UserError: shots must be a whole number from 1, and seed one from 0.
    """
    shots, rng = _whole("shots", shots, 1), random.Random(_whole("seed", seed, 0))
    return _draw(train_labels, shots, rng), _draw(val_labels, min(shots, MAX_VAL_SHOTS), rng)


def _whole(name: str, value: object, least: int) -> int:
    """Refuses a seed of None, which would be drawn from the clock, and of -1, which draws what 1 does."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{name} must be a whole number from {least}, but is {value!r}")
    return int(value)


def _draw(labels: Sequence[int], shots: int, rng: random.Random) -> list[int]:
    """A class with fewer images than shots gives all of them, in order, and draws no random number."""
    groups, drawn = defaultdict(list), []
    for i, label in enumerate(labels):
        groups[label].append(i)
    for group in groups.values():
        drawn += rng.sample(group, shots) if len(group) >= shots else group
    return drawn


def load_few_shot(task: str, shots: int, seed: int, root: str | None) -> tuple[ImageSplit, ImageSplit | None]:
    """Few-shot train and val of a named dataset, in the order of the draw; val is None where it would be test.

    CoOp's own draws on disk (pickles in `split_fewshot`) are not opened; drawing again gives the same images.

    Raises:
        UserError: as `few_shot`, or a dataset that cannot be loaded.
    """
    shots, seed = _whole("shots", shots, 1), _whole("seed", seed, 0)  # before the disk is read
    if task not in NAMED:
        raise UserError(f"few-shot draws are made from named datasets, and {task!r} is none; {near(task, NAMED)}")
    train = load_named(task, "train", root)
    val = load_named(task, "val", root) if NAMED[task].own_val else None
    of_train, of_val = few_shot(train.labels, [] if val is None else val.labels, shots, seed)
    return train.take(of_train), None if val is None else val.take(of_val)
