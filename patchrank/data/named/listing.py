"""What the files of a dataset say of one split: which images, in which order, of which classes."""

from __future__ import annotations

from dataclasses import dataclass

from patchrank.data.named.places import how_to_get
from patchrank.errors import UserError
from patchrank.files import exists, join, read_bytes


@dataclass(frozen=True)
class Listing:
    """Images of one split in the order of the file or folder that lists them (`source`).

    ids: paths relative to the folder `images`. labels: places in `classes`, whose names are as CoOp spells them,
    underscores included.
    """

    task: str
    source: str
    images: str
    ids: list[str]
    labels: list[int]
    classes: tuple[str, ...]

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises `UserError` where the file is missing or cannot be read."""
        path = join(self.images, self.ids[i])
        try:
            return read_bytes(path)
        except FileNotFoundError as error:
            raise UserError(self._missing(path)) from error
        except OSError as error:
            raise UserError(f"{self.task}: image {path} cannot be read ({error.strerror or error})") from error

    def check_ends(self) -> None:
        """Raises `UserError` unless the first and the last image are there: a broken download ends early."""
        for name in (self.ids[0], self.ids[-1]):
            path = join(self.images, name)
            if not exists(path):
                raise UserError(self._missing(path))

    def _missing(self, path: str) -> str:
        return f"{self.task}: image {path} is missing, though {self.source} lists it; {how_to_get(self.task)}"


def read_whole(path: str) -> bytes:
    """The bytes of a file that was found. Raises `UserError` where it cannot be read."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_lines(path: str) -> list[tuple[int, str]]:
    """Lines of a text file with their numbers, from 1; without blank ones. Raises `UserError` for other bytes."""
    try:
        lines = read_whole(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: must be UTF-8 text ({error})") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
