"""Task `folder`: images in a folder, or listed by a CSV file; a local path or an fsspec URL."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from functools import partial

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from patchrank.data.decoding import image_extensions
from patchrank.data.image_split import ImageSplit
from patchrank.data.readers.csv_list import read_csv
from patchrank.data.readers.entries import SHARES, Entry, Listing, make_split, read_part
from patchrank.io import filesystem_of, patiently
from patchrank.utils.errors import UserError

LIKE_SPLITS = {*SHARES, "training", "valid", "validation", "dev", "eval", "testing"}


def load_folder(task: str, split: str, root: str | None) -> ImageSplit:
    """A split of a folder of images or of a CSV file, sorted by id; `make_split` says which splits there are.

    In a folder, an image's class is the first folder of its path below the root, however deep the image lies; images
    directly in the root have no label. If all first folders are called train, val or test, they are splits, and
    classes begin below them. If only some are, but two or more have names like splits (train, val, test, training,
    valid, validation, dev, eval or testing, in any case), they are refused, since somebody meant splits. One such
    folder is a class, since trains and tests can be photographed. Hidden files, and files without an image's
    extension, are left out.

    A CSV file (root ends with .csv) has a header with the column `path`, relative to the file's own folder or
    absolute. It may have `label` (a class by name), `caption`, `split`, and `group` (a name that images of the same
    person, video or place share: intervals draw them together). Other columns are not read.

    Raises:
        UserError: no root or nothing there, folders of which only some are splits, a CSV file without these columns,
            or what `make_split` refuses.
    """
    if root is None:
        raise UserError(f"data.root is missing: task {task!r} needs a folder of images, or a CSV file that lists them")
    return make_split(task, split, patiently(root, lambda: _found(root)), root)


def _found(root: str) -> Listing:
    filesystem, name = filesystem_of(root)
    if filesystem.isdir(name):
        return Listing(_entries(filesystem, name, root))
    if not filesystem.isfile(name):
        raise UserError(f"data.root {root}: there is no such folder or CSV file")
    if not name.lower().endswith(".csv"):
        raise UserError(f"data.root {root}: is a file, but must be a folder of images, or a CSV file that lists them")
    return read_csv(filesystem, posixpath.dirname(name), root)


def _entries(filesystem: AbstractFileSystem, folder: str, root: str) -> list[Entry]:
    """Entries of the images below a folder."""
    names = _names(filesystem, folder)
    splits = _are_splits([name.split("/") for name in names], root)
    entries = []
    for name in names:
        split, _, inner = name.partition("/") if splits else (None, "", name)
        label = inner.split("/")[0] if "/" in inner else None
        read = partial(read_part, filesystem, posixpath.join(folder, name))
        entries.append(Entry(name, name, read, label, split=split))
    return entries


def _are_splits(paths: Sequence[list[str]], root: str) -> bool:
    """Whether the first folders are splits, not classes. Raises `UserError` where some look like splits."""
    folders = sorted({path[0] for path in paths if len(path) > 1})
    others = [f"folder {name}" for name in folders if name not in SHARES]
    others += [f"image {path[0]}" for path in paths if len(path) == 1]
    alike = [name for name in folders if name.lower() in LIKE_SPLITS]
    if others and len(alike) > 1:
        raise UserError(
            f"data.root {root}: folders {', '.join(alike)} look like splits, but {others[0]} does not fit: splits "
            "must be called exactly train, val, test, with nothing beside them; or list the images in a CSV file with "
            "a column 'split'"
        )
    return not others


def _names(filesystem: AbstractFileSystem, root: str) -> list[str]:
    """Paths of the images below a folder, relative to it."""
    try:
        if isinstance(filesystem, LocalFileSystem):
            names = _walk(root, "", frozenset())
        else:
            names = (path[len(root.rstrip("/")) + 1 :] for path in filesystem.find(root))
        shown = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
        return [name for name in shown if posixpath.splitext(name)[1].lower() in image_extensions()]
    except PermissionError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from error


def _walk(folder: str, prefix: str, above: frozenset[str]) -> Iterator[str]:
    """Files below a folder. Links are followed, unless they lead back to a folder `above`."""
    above = above | {os.path.realpath(folder)}
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            if os.path.isfile(path) or os.path.islink(path):  # a dead link counts as a broken image
                yield prefix + name
        elif not name.startswith(".") and os.path.realpath(path) not in above:
            yield from _walk(path, f"{prefix}{name}/", above)
