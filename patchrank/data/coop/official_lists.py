"""Datasets with lists of their own: FGVC Aircraft and ImageNet.

Aircraft has its official splits in text files, one line an image; classes are the variants in their file's order.
ImageNet has a folder per class, and their names in `classnames.txt`; val and test are its 50,000 validation images.
"""

from __future__ import annotations

import re

from patchrank.data.coop.listing import DatasetFolders, Listing, how_to_get, read_lines
from patchrank.data.readers.file_tree import count_others
from patchrank.io import join, list_names, nfc
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress

WNID = "n[0-9]{8}"
ENDINGS = (".jpeg", ".jpg", ".png")


def list_aircraft(folders: DatasetFolders, split: str) -> Listing:
    """Raises `UserError` for a file that is missing, or a line that is not `<number> <variant>`."""
    variants = tuple(name for _, name in read_lines(folders.find("variants.txt")))
    source = folders.find(f"images_variant_{split}.txt")
    label_of = {nfc(name): label for label, name in enumerate(variants)}
    ids, labels = [], []
    for number, line in read_lines(source):
        image, _, variant = line.partition(" ")  # variants have spaces too: "Beechcraft 1900"
        if not re.fullmatch("[0-9]+", image) or nfc(variant) not in label_of:
            rule = "must be an image's number, a space and a variant of variants.txt"
            raise UserError(f"{source}: line {number} {rule}, but is {line[:120]!r}")
        ids.append(f"{image}.jpg")
        labels.append(label_of[nfc(variant)])
    if not ids:
        raise UserError(f"{source}: lists no images")
    return Listing(folders.task, source, folders.find("images", probe=ids[0]), ids, labels, variants)


def list_imagenet(folders: DatasetFolders, split: str) -> Listing:
    """All images of a split, folders and files sorted; a label is the rank of its folder's name.

    Other files in the classes' folders are counted.

    Raises:
        UserError: a class has no folder, no images or no name.
    """
    source = folders.find("classnames.txt")
    names = read_class_names(source)
    wnids, part = sorted(names), "train" if split == "train" else "val"
    images = folders.find(f"images/{part}", part, probe=wnids[0])
    unnamed = [name for name in list_names(images) if re.fullmatch(WNID, name) and name not in names]
    if unnamed:
        raise UserError(f"{images}: folder {unnamed[0]} has no line in {source}; {how_to_get(folders.task)}")
    ids, labels, others = [], [], []
    for label, wnid in enumerate(progress(wnids, desc=f"list imagenet {part}", unit="folder", delay=2)):
        files = list_names(join(images, wnid))
        shown = [name for name in files if name.lower().endswith(ENDINGS) and not name.startswith(".")]
        others += sorted(set(files) - set(shown))
        found = [f"{wnid}/{name}" for name in shown]
        if not found:
            raise UserError(f"{join(images, wnid)}: no image in it, but {source} names it; {how_to_get(folders.task)}")
        ids += found
        labels += [label] * len(found)
    classes = tuple(names[wnid] for wnid in wnids)
    return Listing(folders.task, source, images, ids, labels, classes, count_others(others))


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
