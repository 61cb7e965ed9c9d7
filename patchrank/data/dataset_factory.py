"""Datasets by name: a task and a split in, an `ImageSplit` out."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike

from patchrank.data.broken_images import fingerprinted, without_broken
from patchrank.data.class_names import read_vocabulary
from patchrank.data.coop import NAMED, load_named
from patchrank.data.digits import scenes as digits
from patchrank.data.image_split import ImageSplit, Reader
from patchrank.data.readers.entries import shown
from patchrank.data.readers.folder import load_folder
from patchrank.data.readers.wds import load_wds
from patchrank.utils.errors import UserError, near
from patchrank.utils.plain import plain
from patchrank.utils.progress import write_once


@dataclass(frozen=True)
class Task:
    """How the splits of a task are loaded.

    load: task, split and root in, the split in the order of its source out. training: the split that golden scores and
    predictors are made from. default: the split that is evaluated if none is named. embedded: whether images are drawn,
    and need no root. checked: whether images that cannot be decoded are left out; named datasets keep all of theirs.
    credit: what pages that show images must say of their makers.
    """

    load: Callable[[str, str, str | None], ImageSplit]
    training: str = "train"
    default: str = "val"
    embedded: bool = False
    checked: bool = False
    credit: str = ""


def _digits(task: str, split: str, root: None) -> ImageSplit:
    scenes = digits.DigitScenes(split, task=task)
    reader = Reader(partial(_png, scenes), range(len(scenes)))
    about = {"groups": scenes.groups, "unit": "digit", "version": digits.VERSION, "drawn": True}
    labels = scenes.labels.tolist()
    return ImageSplit(task, split, scenes.ids, labels, digits.CLASSES, digits.TEMPLATES, reader, **about)


def _png(scenes: digits.DigitScenes, i: int) -> bytes:
    buffer = io.BytesIO()
    scenes[i].save(buffer, "PNG")
    return buffer.getvalue()


TASKS: dict[str, Task] = {
    **dict.fromkeys(digits.STYLES, Task(_digits, training="adapt", embedded=True, credit=digits.CREDIT)),
    **dict.fromkeys(NAMED, Task(load_named)),
    "folder": Task(load_folder, default="all", checked=True),
    "wds": Task(load_wds, default="all", checked=True),
}


def find_task(name: str) -> Task:
    """Raises `UserError` for a name that no task has."""
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"data {name!r} does not exist; {near(name, TASKS)}")
    return TASKS[name]


def load_split(
    task: str,
    split: str | None = None,
    limit: int | None = None,
    root: str | None = None,
    vocabulary: str | None = None,
    templates: Sequence[str] | None = None,
) -> ImageSplit:
    """The first `limit` images of a split (all of them where it is None).

    Lists of images on disk often go class by class, so these images are shuffled, by their ids alone. Their bytes
    decide on `version`: those of all files that are checked, or of a few files of a named dataset.

    Args:
        split: the task's default if left out.
        root: where images on disk lie; see docs/data.md.
        vocabulary: YAML file of class names and templates.
        templates: prompts in place of the task's own.

    Raises:
        UserError: no such task or split, a limit below 1, a root that is no path, one template instead of a list,
            images that are not there or too often broken, a root for an embedded task.
    """
    found, limit = find_task(task), plain(limit)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"limit must be a whole number of images from 1, or None for all, but is {limit!r}")
    if not isinstance(root, str | PathLike | None):
        raise UserError(f"data.root must be a path or URL, but is {root!r}")
    if isinstance(templates, str):
        raise UserError(f"templates must be a list, but is the text {templates!r}; try [{templates!r}]")
    if root is not None and found.embedded:
        raise UserError(f"data.root is {root!r}, but task {task!r} is embedded and needs none: leave it out")
    names = None if vocabulary is None else read_vocabulary(vocabulary)
    images = found.load(task, split or found.default, root)
    if images.passed_over:
        count, where = sum(images.passed_over.values()), f"{task} {root}"
        says = f"passed over what is no image by its name or place, {count:,} in all"
        write_once(f"{where}: {says}: {shown(images.passed_over)}")
    if found.embedded:
        images = images.first(limit)
    elif found.checked:
        images = without_broken(images.mixed(), limit)
    else:
        images = fingerprinted(images.mixed().first(limit))
    if names is not None:
        images = names.apply(images)
    return images if templates is None else replace(images, templates=tuple(templates))
