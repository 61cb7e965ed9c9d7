"""The images of one split of a dataset: which, in which order, and of which classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from patchrank.data.coop.folders import how_to_get
from patchrank.data.image_split import Reader
from patchrank.io import exists, join, read_bytes
from patchrank.utils.errors import UserError


@dataclass(frozen=True)
class Listing:
    """Images of one split in the order of the file or folder that lists them (`source`).

    ids: paths relative to the folder `images`. labels: indices into `classes`. classes: names as CoOp spells them,
    underscores included.
    """

    task: str
    source: str
    images: str
    ids: list[str]
    labels: list[int]
    classes: tuple[str, ...]

    def reader(self) -> Reader:
        """Reads images by their index; it keeps no reference to the listing."""
        return Reader(partial(_read, self.task, self.source, self.images), self.ids)

    def check_ends(self) -> None:
        """Raises `UserError` unless the first and the last image exist: a download that broke off ends early."""
        for name in (self.ids[0], self.ids[-1]):
            path = join(self.images, name)
            if not exists(path):
                raise UserError(_missing(self.task, self.source, path))


def _read(task: str, source: str, images: str, name: str) -> bytes:
    """The bytes of an image. Raises `UserError` where the file is missing or cannot be read."""
    path = join(images, name)
    try:
        return read_bytes(path)
    except FileNotFoundError as error:
        raise UserError(_missing(task, source, path)) from error
    except OSError as error:
        raise UserError(f"{task}: image {path} cannot be read ({error.strerror or error})") from error


def _missing(task: str, source: str, path: str) -> str:
    return f"{task}: image {path} is missing, though {source} lists it; {how_to_get(task)}"


def read_whole(path: str) -> bytes:
    """The bytes of a file that was found. Raises `UserError` where it cannot be read."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_lines(path: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        lines = read_whole(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: must be UTF-8 text ({error})") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
