"""A split of images: encoded bytes, ids, and labels, class names or captions where there are any."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from patchrank.data.decoding import DECODERS, why
from patchrank.utils.errors import UserError, one_line

THREADS = min(8, os.cpu_count() or 1)  # that read and decode images


class UnreadError(UserError):
    """The bytes of an image could not be read; `__cause__` says why."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads image i as `fetch(keys[i])`. It has the keys of one split's images alone."""

    fetch: Callable[[Any], bytes]
    keys: Sequence[Any]

    def __call__(self, i: int) -> bytes:
        return self.fetch(self.keys[i])

    def take(self, places: Sequence[int]) -> Reader:
        return Reader(self.fetch, [self.keys[i] for i in places])


@dataclass(frozen=True)
class ImageSplit:
    """One split of one task.

    labels: indices into `classes`; None where they are not known.
    read: gives the bytes of image i as they are on disk (rendered scenes: as PNG), or raises what its file system does.
    decoding: key of `DECODERS`, which turn these bytes into RGB.
    captions: the texts of each image, one or several.
    groups: for each image a name that it shares with images which show much the same (scenes of one digit, clips of
        one video), in whatever task or split; None where each image is a group of its own.
    unit: the word for a group: "digit", "group" or "image".
    skipped: how many images were left out since they cannot be decoded.
    passed_over: how many files of the root are no images of the split, by why they are none.
    version: another number where the same ids come with other pixels.
    drawn: images are computed in Python, which threads do not speed up.
    tensors: all images transformed, after `loaded`.
    """

    task: str
    split: str
    ids: list[str]
    labels: list[int] | None
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    read: Reader
    decoding: str = "plain"
    captions: list[tuple[str, ...]] | None = None
    groups: list[str] | None = None
    unit: str = "image"
    skipped: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    version: int = 1
    drawn: bool = False
    tensors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Image.Image:
        """Raises `UserError` where it cannot be read or decoded."""
        return self.decode(i, self.content(i))

    def content(self, i: int) -> bytes:
        """The bytes of image i. Raises `UnreadError` in place of what its file system raises."""
        try:
            return self.read(i)
        except UserError:
            raise
        except Exception as error:  # file systems behind URLs have errors of their own, without a common class
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UnreadError(f"{self.task}/{self.split}: image {self.ids[i]} cannot be read ({reason})") from error

    def decode(self, i: int, content: bytes) -> Image.Image:
        """Image i from its bytes. Raises `UserError` where they are no image, or a damaged one."""
        try:
            return DECODERS[self.decoding](content)
        except Exception as error:
            name = f"{self.task}/{self.split}: image {self.ids[i]}"
            raise UserError(f"{name} cannot be decoded ({why(error, content)})") from error

    def label(self, i: int) -> int | None:
        return None if self.labels is None else self.labels[i]

    def clusters(self) -> list[str]:
        """The group of each image, by which statistics draw; names of different tasks are different."""
        return [f"{self.task}/{name}" for name in self.ids] if self.groups is None else self.groups

    def numbered_captions(self) -> tuple[list[str], list[list[int]]]:
        """The different captions, and for each image the places of its own among them.

        Raises:
            UserError: an image has none.
        """
        places: dict[str, int] = {}
        own = []
        for name, texts in zip(self.ids, self.captions):
            texts = [texts] if isinstance(texts, str) else texts
            own.append(sorted({places.setdefault(text, len(places)) for text in texts}))
            if not own[-1]:
                raise UserError(f"{self.task}/{self.split}: image {name} has no caption, but must have one or more")
        return list(places), own

    def ids_sha256(self) -> str:
        return hashlib.sha256("\n".join([str(self.version), *self.ids]).encode()).hexdigest()

    def batches(self, transform: Callable[[Image.Image], Tensor], batch_size: int) -> Iterator[tuple[Tensor, range]]:
        """Transformed images (b, 3, H, W) and their indices, in order.

        Threads decode and transform them, one batch ahead of the caller's work, so `transform` must be thread-safe.
        """
        parts = [range(i, min(i + batch_size, len(self))) for i in range(0, len(self), batch_size)]
        if self.tensors is not None:
            yield from ((self.tensors[part.start : part.stop], part) for part in parts)
        elif self.drawn:
            yield from ((torch.stack([transform(self.image(i)) for i in part]), part) for part in parts)
        else:
            yield from ahead(lambda i: transform(self.image(i)), parts)

    def first(self, count: int | None) -> ImageSplit:
        """The split of its first `count` images; all of them where it is None."""
        return self if count is None else self.take(range(min(count, len(self))))

    def take(self, places: Sequence[int]) -> ImageSplit:
        """The split of some of its images, in the order of `places`; it keeps nothing of the others."""
        places, some = list(places), {}
        for name in ("ids", "labels", "captions", "groups"):
            values = getattr(self, name)
            some[name] = None if values is None else [values[i] for i in places]
        tensors = None if self.tensors is None else self.tensors[places]
        return replace(self, read=self.read.take(places), tensors=tensors, **some)

    def mixed(self) -> ImageSplit:
        """The same images, shuffled by their ids alone, so that the first few are of many classes."""
        keys = [hashlib.sha256(name.encode()).digest() for name in self.ids]
        return self.take(sorted(range(len(self)), key=keys.__getitem__))

    def loaded(self, transform: Callable[[Image.Image], Tensor], limit: int) -> ImageSplit:
        """The same split with its images decoded and transformed in memory, if they fit into `limit` bytes."""
        one = transform(self.image(0))
        if self.tensors is not None or one.nbytes * len(self) > limit:
            return self
        return replace(self, tensors=torch.cat([images for images, _ in self.batches(transform, 64)]))


def ahead(one: Callable[[int], Tensor], parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Sequence[int]]]:
    """For each part a stack of `one(i)`, and the part; threads compute the next one while the caller has this."""
    pool, waiting = ThreadPoolExecutor(THREADS), deque()
    try:
        for part in parts:
            waiting.append((pool.map(one, part), part))
            if len(waiting) > 1:
                images, done = waiting.popleft()
                yield torch.stack(list(images)), done
        for images, done in waiting:
            yield torch.stack(list(images)), done
    finally:
        pool.shutdown(cancel_futures=True)
