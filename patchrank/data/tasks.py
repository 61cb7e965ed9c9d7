"""Images by name: a task and a split in, a list of encoded images with ids, labels and class names out."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from patchrank.data import digits
from patchrank.errors import UserError, near


@dataclass(frozen=True)
class ImageSplit:
    """One split of one task.

    read(i) gives the bytes of image i as they lie on disk (rendered scenes: as PNG), `extension` says of what kind.
    version changes when the same ids would come with other pixels. tensors: all images transformed, once `loaded`.
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
    tensors: Tensor | None = None

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
            if self.tensors is not None:
                yield self.tensors[places.start : places.stop], places
            else:
                yield torch.stack([transform(self.image(i)) for i in places]), places

    def first(self, count: int | None) -> ImageSplit:
        """The split of its first `count` images; all of them where it is None."""
        tensors = self.tensors if self.tensors is None else self.tensors[:count]
        return replace(self, ids=self.ids[:count], labels=self.labels[:count], tensors=tensors)

    def loaded(self, transform: Callable[[Image.Image], Tensor], limit: int) -> ImageSplit:
        """The same split with its images decoded and transformed in memory, if they fit into `limit` bytes."""
        one = transform(self.image(0))
        if self.tensors is not None or one.nbytes * len(self) > limit:
            return self
        return replace(self, tensors=torch.stack([transform(self.image(i)) for i in range(len(self))]))


def decode_image(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _digits(task: str, split: str, limit: int | None) -> ImageSplit:
    scenes = digits.DigitScenes(split, task=task)
    count = len(scenes) if limit is None else min(limit, len(scenes))
    return ImageSplit(
        task,
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


TASKS: dict[str, Callable[[str, str, int | None], ImageSplit]] = dict.fromkeys(digits.STYLES, _digits)


def load_split(task: str, split: str, limit: int | None = None, root: str | None = None) -> ImageSplit:
    """The first `limit` images of a split (all of them where it is None).

    Raises:
        UserError: no such task or split, or a root for a task that is embedded.
    """
    if task not in TASKS:
        raise UserError(f"data {task!r} does not exist; {near(task, TASKS)}")
    if root is not None:
        raise UserError(f"data.root is {root!r}, but task {task!r} is embedded and needs none: leave it out")
    return TASKS[task](task, split, limit)
