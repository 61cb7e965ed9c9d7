"""A split of images: encoded bytes, ids, and what is known of them (labels, class names, captions)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from patchrank.data.decoding import DECODERS


@dataclass(frozen=True)
class ImageSplit:
    """One split of one task.

    read(i) gives the bytes of image i as they lie on disk (rendered scenes: as PNG); `decoding` names what turns them
    into RGB. labels: places in `classes`, None where nobody said what the images show. captions: one text for each
    image. skipped: images that were left out since nothing can decode them. version changes when the same ids would
    come with other pixels. tensors: all images transformed, once `loaded`.
    """

    task: str
    split: str
    ids: list[str]
    labels: list[int] | None
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    read: Callable[[int], bytes]
    decoding: str = "plain"
    captions: list[str] | None = None
    skipped: int = 0
    version: int = 1
    tensors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Image.Image:
        return DECODERS[self.decoding](self.read(i))

    def label(self, i: int) -> int | None:
        return None if self.labels is None else self.labels[i]

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
        return self if count is None else self.take(range(min(count, len(self))))

    def take(self, places: Sequence[int]) -> ImageSplit:
        """The split of some of its images, in the order of `places`."""
        places, read, some = list(places), self.read, {}
        for name in ("labels", "captions"):
            values = getattr(self, name)
            some[name] = None if values is None else [values[i] for i in places]
        tensors = None if self.tensors is None else self.tensors[places]
        return replace(self, ids=[self.ids[i] for i in places], read=lambda i: read(places[i]), tensors=tensors, **some)

    def mixed(self) -> ImageSplit:
        """The same images in an order that depends on their ids alone, so that the first few are of many classes."""
        keys = [hashlib.sha256(name.encode()).digest() for name in self.ids]
        return self.take(sorted(range(len(self)), key=keys.__getitem__))

    def loaded(self, transform: Callable[[Image.Image], Tensor], limit: int) -> ImageSplit:
        """The same split with its images decoded and transformed in memory, if they fit into `limit` bytes."""
        one = transform(self.image(0))
        if self.tensors is not None or one.nbytes * len(self) > limit:
            return self
        return replace(self, tensors=torch.stack([transform(self.image(i)) for i in range(len(self))]))
