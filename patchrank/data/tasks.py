"""Images by name: a task and a split in, a list of encoded images with ids, labels and class names out."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from patchrank.data import digits
from patchrank.data.images import ImageSplit
from patchrank.errors import UserError, near


@dataclass(frozen=True)
class Task:
    """How the splits of a task are had.

    load(task, split, root) gives a split in the order in which its source lists it. training: the split that golden
    scores and predictors are made from. default: what is evaluated where nobody says.
    """

    load: Callable[[str, str, str | None], ImageSplit]
    training: str = "train"
    default: str = "val"
    embedded: bool = False


def _digits(task: str, split: str, root: None) -> ImageSplit:
    scenes = digits.DigitScenes(split, task=task)
    return ImageSplit(
        task,
        split,
        scenes.ids,
        scenes.labels.tolist(),
        digits.CLASSES,
        digits.TEMPLATES,
        lambda i: _png(scenes[i]),
        version=digits.VERSION,
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


TASKS: dict[str, Task] = dict.fromkeys(digits.STYLES, Task(_digits, training="adapt", embedded=True))


def find_task(name: str) -> Task:
    """Raises `UserError` for a name that no task has."""
    if name not in TASKS:
        raise UserError(f"data {name!r} does not exist; {near(name, TASKS)}")
    return TASKS[name]


def load_split(task: str, split: str | None = None, limit: int | None = None, root: str | None = None) -> ImageSplit:
    """The first `limit` images of a split (all of them where it is None).

    Images on disk come in an order of their own that depends on their ids alone, since their lists go class by class.

    Raises:
        UserError: no such task or split, or a root for a task that is embedded.
    """
    found = find_task(task)
    if root is not None and found.embedded:
        raise UserError(f"data.root is {root!r}, but task {task!r} is embedded and needs none: leave it out")
    images = found.load(task, split or found.default, root)
    return (images if found.embedded else images.mixed()).first(limit)
