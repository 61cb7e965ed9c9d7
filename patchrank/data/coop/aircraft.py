"""FGVC Aircraft: official splits in text files, one line an image; classes are the variants in their file's order."""

from __future__ import annotations

import re

from patchrank.data.coop.folders import DatasetFolders
from patchrank.data.coop.listing import Listing, read_lines
from patchrank.utils.errors import UserError


def list_aircraft(folders: DatasetFolders, split: str) -> Listing:
    """Raises `UserError` for a file that is missing, or a line that is not `<number> <variant>`."""
    variants = tuple(name for _, name in read_lines(folders.find("variants.txt")))
    source = folders.find(f"images_variant_{split}.txt")
    label_of = {name: label for label, name in enumerate(variants)}
    ids, labels = [], []
    for number, line in read_lines(source):
        image, _, variant = line.partition(" ")  # variants have spaces too: "Beechcraft 1900"
        if not re.fullmatch("[0-9]+", image) or variant not in label_of:
            rule = "must be an image's number, a space and a variant of variants.txt"
            raise UserError(f"{source}: line {number} {rule}, but is {line[:120]!r}")
        ids.append(f"{image}.jpg")
        labels.append(label_of[variant])
    if not ids:
        raise UserError(f"{source}: lists no images")
    return Listing(folders.task, source, folders.find("images", probe=ids[0]), ids, labels, variants)
