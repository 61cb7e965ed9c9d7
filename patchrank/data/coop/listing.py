"""Where the files of a named dataset lie, and what a split of it lists: which images, in which order and classes."""

from __future__ import annotations

from dataclasses import dataclass, field

from patchrank.io import exists, join, read_bytes, read_text, stored_name
from patchrank.utils.errors import UserError


@dataclass(frozen=True)
class DatasetFolders:
    """Where the files of one dataset may lie.

    root: a path or an fsspec URL. names: of the dataset's own folder under the root, CoOp's first.
    """

    task: str
    root: str
    names: tuple[str, ...]

    def all(self) -> list[str]:
        """Every folder to look into, CoOp's first. The root is one, since it may be the dataset's own folder."""
        inside = [name.partition("/")[2] for name in self.names]
        return list(dict.fromkeys(join(self.root, name).rstrip("/") for name in [*self.names, *inside]))

    def find(self, *names: str, probe: str = "", why: str = "") -> str:
        """The path of a file or folder of the dataset; of several names the first that is there.

        Args:
            probe: a file that must lie in the folder, since a folder called `images` may belong to any dataset.
            why: ends the message: why nothing can stand in for the file.

        Raises:
            UserError: it is in none of the folders, which are named.
        """
        for folder in self.all():
            for name in names:
                path = join(folder, name)
                if exists(join(path, stored_name(path, probe)).rstrip("/")):
                    return path
        if not exists(self.root):
            raise UserError(f"{self.task}: data.root {self.root!r} does not exist; {how_to_get(self.task)}")
        wanted = " or ".join(join(name, probe).rstrip("/") for name in names)
        looked = ", ".join(self.all())
        raise UserError(f"{self.task}: {wanted} not found, looked for in {looked}{why}; {how_to_get(self.task)}")


def how_to_get(task: str) -> str:
    """Ends a message about files that are missing."""
    return f"docs/data.md#{task} says how to get it"


@dataclass(frozen=True)
class Listing:
    """Images of one split in the order of the file or folder that lists them (`source`).

    ids: paths relative to the folder `images`. labels: indices into `classes`. classes: names as CoOp spells them,
    underscores included. passed_over: where a folder is the list, how many of its files are no images, by why.
    """

    task: str
    source: str
    images: str
    ids: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    passed_over: dict[str, int] = field(default_factory=dict)


def read_listed(task: str, source: str, images: str, name: str) -> bytes:
    """The bytes of an image, in whatever of Unicode's normal forms its name is stored.

    Raises:
        UserError: there is no such file.
    """
    path = join(images, name)
    try:
        return read_bytes(join(images, stored_name(images, name)))
    except FileNotFoundError as error:
        raise UserError(f"{task}: image {path} is missing, though {source} lists it; {how_to_get(task)}") from error


def read_lines(path: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1; errors are those of `read_text`.

    A byte order mark may start any line, as it does where files were joined.
    """
    lines = (line.removeprefix("\ufeff").strip() for line in read_text(path).splitlines())
    return [(number, line) for number, line in enumerate(lines, 1) if line]
