"""The files below a folder: which are images by their names, and why the others are none."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from patchrank.data.decoding import image_extensions
from patchrank.utils.errors import UserError

HIDDEN = "hidden or in system folders"
LEADS_BACK = "links that lead back"
NO_FILES = "neither files nor folders"
UNREADABLE = "system folders that cannot be read"
OTHERS = "other endings"
ENDINGS = 8  # that are counted one by one

# Folders that file managers, archives and storage boxes make; those of more kinds are hidden by a dot.
SYSTEM = {
    "@eadir", "#recycle", "@recycle", "@recently-snapshot", "#snapshot", "@tmp", "$recycle.bin", "__macosx",
    "lost+found", "system volume information", "network trash folder", "temporary items",
}  # fmt: skip


@dataclass
class FileTree:
    """What lies below a folder, by paths relative to it.

    images: files with an image's ending. others: files with another one, or none. folders: those that are neither
    hidden nor a system's. passed_over: how many files are no images, by why they are none.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    passed_over: Counter[str] = field(default_factory=Counter)


def read_tree(filesystem: AbstractFileSystem, root: str) -> FileTree:
    """All files below a folder. Stores have no empty folders, so there every folder holds a file.

    Raises:
        UserError: a folder cannot be read.
    """
    tree = FileTree()
    try:
        if isinstance(filesystem, LocalFileSystem):
            _walk(root, "", frozenset(), tree)
        else:
            for path in filesystem.find(root):
                _add(path[len(root.rstrip("/")) + 1 :], tree)
    except PermissionError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from error
    return tree


def count_others(names: Iterable[str]) -> dict[str, int]:
    """Why files are no images by their names, as {"ending .heic": 3, "no ending": 1}; rare endings count together."""
    names = list(names)
    found = Counter(by_ending(name) for name in names if not is_hidden(name))
    counted = dict(sorted(found.items(), key=lambda item: (item[0] == OTHERS, -item[1], item[0]))[:ENDINGS])
    if rest := found.total() - sum(counted.values()):
        counted[OTHERS] = counted.get(OTHERS, 0) + rest
    if hidden := len(names) - found.total():
        counted[HIDDEN] = hidden
    return counted


def is_hidden(path: str) -> bool:
    """Whether a part of a relative path is hidden by a dot, or called as a system's folder."""
    parts = (part for part in path.split("/") if part not in (".", ".."))  # of which tars may be full
    return any(part.startswith(".") or part.lower() in SYSTEM for part in parts)


def by_ending(name: str) -> str:
    """Why a file of this name is no image: "ending .heic", "no ending", or "other endings" for what is hardly one."""
    ending = posixpath.splitext(name)[1].lower()
    if re.fullmatch(r"\.(?!\d+$)[\w~+-]{1,12}", ending):  # not numbers, which could be thousands
        return f"ending {ending}"
    return "no ending" if ending in ("", ".") else OTHERS


def _add(name: str, tree: FileTree) -> None:
    """Sorts a file in by its path."""
    *folders, last = name.split("/")
    if is_hidden(name):
        tree.passed_over[HIDDEN] += 1
        return
    tree.folders.update("/".join(folders[:depth]) for depth in range(1, len(folders) + 1))
    if last:  # a store may list a folder, as "cats/"
        is_image = posixpath.splitext(last)[1].lower() in image_extensions()
        (tree.images if is_image else tree.others).append(name)


def _walk(folder: str, prefix: str, above: frozenset[str], tree: FileTree) -> None:
    """Sorts in what lies below a local folder. Links are followed, unless they lead back to a folder `above`."""
    above = above | {os.path.realpath(folder)}
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            if os.path.isfile(path) or os.path.islink(path):  # a dead link counts as a broken image
                _add(prefix + name, tree)
            else:
                tree.passed_over[NO_FILES] += 1
        elif is_hidden(name):
            tree.passed_over.update(_count_hidden(path))
        elif os.path.realpath(path) in above:
            tree.passed_over[LEADS_BACK] += 1
        else:
            tree.folders.add(prefix + name)
            _walk(path, f"{prefix}{name}/", above, tree)


def _count_hidden(folder: str) -> Iterator[str]:
    """Why each file of a hidden folder is passed over. No link is followed, and what is locked is one thing."""
    if os.path.islink(folder):
        yield HIDDEN
        return
    locked: list[OSError] = []
    for _, _, files in os.walk(folder, onerror=locked.append):
        yield from (HIDDEN for _ in files)
    yield from (UNREADABLE for _ in locked)
