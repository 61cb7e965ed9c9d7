"""Images by name: a task and a split in, a list of encoded images with ids, labels and class names out."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from patchrank.data import digits
from patchrank.errors import UserError, near


@dataclass(frozen=True)
class ImageSplit:
    """One split of one task.

    read(i) gives the bytes of image i as they lie on disk (rendered scenes: as PNG), `extension` says of what kind.
    version changes when the same ids would come with other pixels.
    """

    task: str
    split: str
    ids: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    read: Callable[[int], bytes]
    extension: str = "png"
    version: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Image.Image:
        return decode_image(self.read(i))

    def ids_sha256(self) -> str:
        return hashlib.sha256("\n".join([str(self.version), *self.ids]).encode()).hexdigest()

    def batches(self, transform: Callable[[Image.Image], Tensor], batch_size: int) -> Iterator[tuple[Tensor, range]]:
        """Transformed images (b, 3, H, W) and their positions, in order."""
        for start in range(0, len(self), batch_size):
            places = range(start, min(start + batch_size, len(self)))
            yield torch.stack([transform(self.image(i)) for i in places]), places


def decode_image(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _digits(split: str, limit: int | None) -> ImageSplit:
    scenes = digits.DigitScenes(split)
    count = len(scenes) if limit is None else min(limit, len(scenes))
    return ImageSplit(
        "digits",
        split,
        scenes.ids[:count],
        scenes.labels[:count].tolist(),
        digits.CLASSES,
        digits.TEMPLATES,
        lambda i: _png(scenes[i]),
        version=digits.VERSION,
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


TASKS: dict[str, Callable[[str, int | None], ImageSplit]] = {"digits": _digits}


def load_split(task: str, split: str, limit: int | None = None, root: str | None = None) -> ImageSplit:
    """The first `limit` images of a split (all of them where it is None).

    Raises:
        UserError: no such task or split, or a root for a task that is embedded.
    """
    if task not in TASKS:
        raise UserError(f"data {task!r} does not exist; {near(task, TASKS)}")
    if root is not None:
        raise UserError(f"data.root is {root!r}, but task {task!r} is embedded and needs none: leave it out")
    return TASKS[task](split, limit)
