"""Images to look at: anyone's own files, or the first ones of a task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from patchrank.data.decoding import decode_viewer, fault
from patchrank.data.digits import scenes as digits
from patchrank.data.image_split import ImageSplit
from patchrank.io import read_bytes
from patchrank.models.captions import check_classes, check_templates
from patchrank.utils.errors import UserError, near


@dataclass(frozen=True)
class Pictures:
    """Images, what stands above each, and what the model may answer.

    classes, templates: of the zero-shot head; () where nothing is to be answered. labels: places in `classes`, one an
    image, or None where nobody knows.
    """

    images: list[Image.Image]
    names: list[str]
    classes: tuple[str, ...] = digits.CLASSES
    templates: tuple[str, ...] = digits.TEMPLATES
    labels: list[int] | None = None


def split_pictures(split: ImageSplit, answers: bool = True) -> Pictures:
    """All images of a split, with their labels.

    Args:
        answers: False if the model does not answer by the names of the task's classes.

    Raises:
        UserError: the task's classes have no names, so that no answer could be drawn.
    """
    if answers and not split.classes:
        raise UserError(f"data {split.task!r} has no class names to answer with: give --vocabulary")
    images = [split.image(i) for i in range(len(split))]
    labels = split.labels if split.classes else None  # numbers say nothing to people
    return Pictures(images, list(split.ids), split.classes, split.templates, labels)


def read_pictures(
    paths: Sequence[str | Path],
    classes: Sequence[str] = digits.CLASSES,
    templates: Sequence[str] = digits.TEMPLATES,
    labels: Sequence[str] | None = None,
) -> Pictures:
    """Image files in any format that Pillow reads.

    Args:
        labels: class names, one an image.

    Raises:
        UserError: a file that is missing or no image, a label that is no class, a template without a place for it.
    """
    classes, templates = check_classes(classes), check_templates(templates)
    if len(set(classes)) < 2:
        raise UserError(f"classes must be two or more to choose among, but are {', '.join(classes)}")
    if labels is not None and len(labels) != len(paths):
        raise UserError(f"labels must be one an image, but are {len(labels)} for {len(paths)} images")
    for label in labels or ():
        if label not in classes:
            raise UserError(f"label {label!r} is not among the classes; {near(label, classes)}")
    places = None if labels is None else [list(classes).index(label) for label in labels]
    names = [os.path.basename(str(path)) for path in paths]
    return Pictures([read_image(path) for path in paths], names, tuple(classes), tuple(templates), places)


def read_image(path: str | Path) -> Image.Image:
    """One image as a viewer shows it: RGB, upright, transparency over white."""
    try:
        content = read_bytes(path)
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror or error})") from error
    if (reason := fault(content, "viewer")) is not None:
        raise UserError(f"image {path}: cannot be read ({reason})")
    return decode_viewer(content)
