"""ImageNet: a folder per class, and names for them in `classnames.txt`; its 50,000 validation images are the test."""

from __future__ import annotations

import re

from patchrank.data.coop.listing import Listing, read_lines
from patchrank.data.coop.locate import Places, how_to_get
from patchrank.io import join, list_names
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress

WNID = "n[0-9]{8}"
ENDINGS = (".jpeg", ".jpg", ".png")


def list_imagenet(places: Places, split: str) -> Listing:
    """All images of a split, folders and files sorted; a label is the rank of its folder's name.

    Raises:
        UserError: a class has no folder, no images or no name.
    """
    source = places.find("classnames.txt")
    names = read_class_names(source)
    wnids, part = sorted(names), "train" if split == "train" else "val"
    images = places.find(f"images/{part}", part, probe=wnids[0])
    unnamed = [name for name in list_names(images) if re.fullmatch(WNID, name) and name not in names]
    if unnamed:
        raise UserError(f"{images}: folder {unnamed[0]} has no line in {source}; {how_to_get(places.task)}")
    ids, labels = [], []
    for label, wnid in enumerate(progress(wnids, desc=f"list imagenet {part}", unit="folder", delay=2)):
        found = [f"{wnid}/{name}" for name in list_names(join(images, wnid)) if _is_image(name)]
        if not found:
            raise UserError(f"{join(images, wnid)}: no image in it, but {source} names it; {how_to_get(places.task)}")
        ids += found
        labels += [label] * len(found)
    return Listing(places.task, source, images, ids, labels, tuple(names[wnid] for wnid in wnids))


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def read_class_names(path: str) -> dict[str, str]:
    """Display names by WordNet id. Two classes may share a name ("missile" and "sunglasses" do), but not an id."""
    names: dict[str, str] = {}
    for number, line in read_lines(path):
        wnid, _, name = line.partition(" ")
        if not re.fullmatch(WNID, wnid) or not name.strip():
            raise UserError(f"{path}: line {number} must be a WordNet id and a class name, but is {line[:120]!r}")
        if wnid in names:
            raise UserError(f"{path}: line {number} names {wnid} again; each class has one line")
        names[wnid] = name.strip()
    if not names:
        raise UserError(f"{path}: names no class")
    return names
