"""Images that a folder, a CSV file or tars list, and their splits: as listed, or by a hash of each id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fsspec import AbstractFileSystem

from patchrank.data.image_split import ImageSplit, Reader
from patchrank.io import patiently
from patchrank.utils.errors import UserError, near

SHARES = {"train": 0.5, "val": 0.2, "test": 0.3}
TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image.

    place: what errors call it. read: gives its bytes. label: a class by name, or by number where names are not known.
    captions: one text or several. split: None where nothing says which. group: a name that it shares with images of
    the same person, video or place; None where it shares none.
    """

    id: str
    place: str
    read: Callable[[], bytes]
    label: str | int | None = None
    captions: tuple[str, ...] | None = None
    split: str | None = None
    group: str | None = None

    def content(self) -> bytes:
        return self.read()


@dataclass(frozen=True)
class Listing:
    """What a reader found: every file of its root is in an entry, or counted by why it was passed over.

    classes: names that are classes even where no entry has them, such as empty folders.
    passed_over: in a few words why files are no images here, and how many there are: {"ending .heic": 3}.
    """

    entries: Sequence[Entry]
    classes: Sequence[str] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)


def read_part(filesystem: AbstractFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a file from `start` to `end`; all of them where these are None."""
    url = filesystem.unstrip_protocol(path)
    return patiently(url, lambda: filesystem.cat_file(path, start=start, end=end))


def shown(passed_over: Mapping[str, int]) -> str:
    """What was passed over, as "ending .heic (3), no ending (1)"."""
    return ", ".join(f"{why} ({many:,})" for why, many in passed_over.items())


def make_split(task: str, split: str, found: Listing, where: str) -> ImageSplit:
    """One split of some images, sorted by id; `where` is what errors call them all.

    The split `all` has every image. The others are those that the entries name. Where they name none, train, val and
    test get 50, 20 and 30 % by a hash of each image's id, or of its group: no image moves when others come or go, and
    no group is in two splits. Classes are those of all images, so that labels mean the same in every split. They are
    sorted by name, or by number where all names are numbers. Labels that are numbers have no classes until a
    vocabulary names them.

    Raises:
        UserError: no images, an id that two images have, an unknown or empty split, or labels, captions or groups for
            some images only.
    """
    others = f"; passed over: {shown(found.passed_over)}" if found.passed_over else ""
    if not found.entries:
        raise UserError(f"data.root {where}: holds no images{others}")
    entries = sorted(found.entries, key=lambda entry: entry.id)
    for entry, other in zip(entries, entries[1:]):
        if entry.id == other.id:
            raise UserError(f"{entry.place} and {other.place}: both are image {entry.id!r}, which must stand once")
    for name in (*(entry.id for entry in entries), *found.classes):
        # file systems allow any bytes in a name; Python shows some of them as surrogates
        if "\n" in name or re.search("[\ud800-\udfff]", name):
            raise UserError(f"{where}: the name {name!r} is not one line of text in UTF-8; rename the file or folder")
    chosen, hashed = _choose(entries, split, where, others)
    known = {name: _all_or_none(name, entries if hashed else chosen, chosen) for name in ("label", "captions", "group")}
    groups = known["group"] and [f"{task}/{name}" for name in known["group"]]
    classes = _classes(entries, found.classes)
    index = {name: i for i, name in enumerate(classes)}
    labels = None if known["label"] is None else [index.get(label, label) for label in known["label"]]
    return ImageSplit(
        task,
        split,
        [entry.id for entry in chosen],
        labels,
        classes,
        TEMPLATES,
        Reader(Entry.content, chosen),
        decoding="viewer",
        captions=known["captions"],
        groups=groups,
        unit="image" if groups is None else "group",
        passed_over=dict(found.passed_over),
    )


def split_of(name: str) -> str:
    """The split of an image of this id, or of a group of this name, by a hash."""
    place = int.from_bytes(hashlib.sha256(f"split of {name}".encode()).digest()[:8], "big") / 2**64
    return "train" if place < SHARES["train"] else "val" if place < SHARES["train"] + SHARES["val"] else "test"


def _choose(entries: Sequence[Entry], split: str, where: str, others: str) -> tuple[list[Entry], bool]:
    """The entries of a split, and whether a hash decided on them."""
    hashed = any(entry.split is None for entry in entries)
    named = [split_of(entry.group or entry.id) if hashed else entry.split for entry in entries]
    known = {"all", *(SHARES if hashed else named)}
    if split not in known:
        raise UserError(f"{where}: split {split!r} does not exist; {near(split, known)}{others}")
    chosen = [entry for entry, name in zip(entries, named) if split in ("all", name)]
    if not chosen:
        raise UserError(
            f"{where}: split {split!r} is empty, since a hash of each name deals so few images out to train, val and "
            "test (50, 20 and 30 %); take split 'all', or name the splits by folders"
        )
    return chosen, hashed


def _all_or_none(name: str, scope: Sequence[Entry], chosen: Sequence[Entry]) -> list[Any] | None:
    """The label, captions or group of every chosen entry; None where no entry in the scope has one."""
    without = next((entry for entry in scope if getattr(entry, name) is None), None)
    having = next((entry for entry in scope if getattr(entry, name) is not None), None)
    if without and having:
        raise UserError(f"{without.place}: has no {name}, but {having.place} has; all must have one, or none")
    return [getattr(entry, name) for entry in chosen] if having else None


def _classes(entries: Sequence[Entry], empty: Sequence[str]) -> tuple[str, ...]:
    """Names in label order; () where labels are numbers, or there are none."""
    first = {}  # kind of label -> the first entry that has it
    for entry in entries:
        first.setdefault(type(entry.label), entry)
    if int in first and str in first:
        raise UserError(
            f"{first[int].place}: the label is the number {first[int].label}, but at {first[str].place} it is the name "
            f"{first[str].label!r}; all must be numbers, or all names"
        )
    names = {entry.label for entry in entries if isinstance(entry.label, str)} | set(empty)
    numbers = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))
