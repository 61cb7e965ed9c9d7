"""Few-shot draws as CoOp makes them, image for image.

One random stream per seed. Train is drawn from first and val from what the stream goes on with; classes come in the
order in which the list meets them, not by label.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from numbers import Integral

from patchrank.data.coop import NAMED, load_named
from patchrank.data.image_split import ImageSplit
from patchrank.utils.errors import UserError, near

MAX_VAL_SHOTS = 4


def few_shot(
    train_labels: Sequence[int], val_labels: Sequence[int], shots: int, seed: int
) -> tuple[list[int], list[int]]:
    """Places of the images that are drawn from train (`shots` a class) and from val (at most 4 a class).

    Args:
        train_labels: labels in the order in which the split file lists the images; it decides what is drawn.
        val_labels: the same of val; empty where there is none.

    Raises:
        UserError: shots or seed that are no whole numbers, from 1 and from 0.
    """
    shots, rng = _whole("shots", shots, 1), random.Random(_whole("seed", seed, 0))
    return _draw(train_labels, shots, rng), _draw(val_labels, min(shots, MAX_VAL_SHOTS), rng)


def _whole(name: str, value: object, least: int) -> int:
    """A seed of None would be drawn from the clock, and -1 draws what 1 does: neither may pass."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{name} must be a whole number from {least}, but is {value!r}")
    return int(value)


def _draw(labels: Sequence[int], shots: int, rng: random.Random) -> list[int]:
    """A class with fewer images than shots gives all it has, in their order, and takes nothing from the stream."""
    groups: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        groups.setdefault(label, []).append(place)
    return [
        place for group in groups.values() for place in (rng.sample(group, shots) if len(group) >= shots else group)
    ]


def load_few_shot(task: str, shots: int, seed: int, root: str | None) -> tuple[ImageSplit, ImageSplit | None]:
    """Few-shot train and val of a named dataset, in the order of the draw; val is None where it would be test.

    Draws that CoOp left on disk (pickles in `split_fewshot`) are not opened: they are drawn again.

    Raises:
        UserError: shots or seed that are no whole numbers, from 1 and from 0, or a dataset that cannot be loaded.
    """
    shots, seed = _whole("shots", shots, 1), _whole("seed", seed, 0)  # before the disk is read
    if task not in NAMED:
        raise UserError(f"few-shot draws are made from named datasets, and {task!r} is none; {near(task, NAMED)}")
    train = load_named(task, "train", root)
    val = load_named(task, "val", root) if NAMED[task].own_val else None
    train_places, val_places = few_shot(train.labels, [] if val is None else val.labels, shots, seed)
    return train.take(train_places), None if val is None else val.take(val_places)
