"""The table of named datasets: folders, how to list a split, prompt and sizes of each."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from patchrank.config import ListOf, Strict
from patchrank.data.coop.listing import DatasetFolders, Listing, how_to_get, read_listed
from patchrank.data.coop.official_lists import list_aircraft, list_imagenet
from patchrank.data.coop.split_file import PARTS, list_coop_split
from patchrank.data.image_split import ImageSplit, Reader
from patchrank.io.yaml import read_yaml
from patchrank.utils.errors import UserError, near
from patchrank.utils.progress import write_line

OWN_LISTS = {"fgvc_aircraft": list_aircraft, "imagenet": list_imagenet}  # others have a split file of CoOp's


class NamedDataset(Strict):
    """How one dataset is read; `datasets.yaml` says what the fields mean."""

    folders: ListOf[str]
    prompt: str
    sizes: ListOf[int]
    images: str | None = None
    split_file: str | None = None
    own_val: bool = True
    group: str | None = None


NAMED = {name: NamedDataset(**about) for name, about in read_yaml(Path(__file__).with_suffix(".yaml")).items()}


def load_named(task: str, split: str, root: str | None) -> ImageSplit:
    """One split of a named dataset, in the order in which its files list it.

    Args:
        task: a key of `NAMED`.
        split: train, val or test.
        root: the folder that holds the dataset's folder, or the latter itself; a path or an fsspec URL.

    Raises:
        UserError: no such task or split, no root, or files that are missing or not as CoOp has them.
    """
    if task not in NAMED:
        raise UserError(f"dataset {task!r} does not exist; {near(task, NAMED)}")
    if split not in PARTS:
        raise UserError(f"{task} has no split {split!r}; {near(split, PARTS)}")
    dataset = NAMED[task]
    if root is None:
        folder = dataset.folders[0]
        raise UserError(f"{task} needs data.root (--data-root), the folder that holds {folder}; {how_to_get(task)}")
    folders = DatasetFolders(task, str(root), dataset.folders)
    if task in OWN_LISTS:
        listing = OWN_LISTS[task](folders, split)
    else:
        listing = list_coop_split(folders, split, dataset.images, dataset.split_file)
    reader = Reader(partial(read_listed, task, listing.source, listing.images), listing.ids)
    images = ImageSplit(task, split, listing.ids, listing.labels, listing.classes, (dataset.prompt,), reader)
    images = replace(images, passed_over=listing.passed_over)
    for i in (0, len(images) - 1):  # a download that broke off ends early
        images.content(i)
    found, known = (len(images.classes), len(images)), (dataset.sizes[0], dataset.sizes[1 + PARTS.index(split)])
    if found != known:
        says = "{} {}: {:,} classes and {:,} images, where CoOp's has {:,} and {:,}"
        write_line(f"warning: {says.format(task, split, *found, *known)}; figures cannot be compared with others'")
    return images if dataset.group is None else replace(images, groups=_groups(listing, dataset.group), unit="group")


def _groups(listing: Listing, pattern: str) -> list[str]:
    """The name of each image's group; an image whose path does not match is a group of its own, with a warning."""
    found = [re.fullmatch(pattern, name) for name in listing.ids]
    if alone := [name for name, match in zip(listing.ids, found) if match is None]:
        write_line(
            f"warning: {listing.source}: {len(alone)} of {len(found)} images have names that tell no group, the first "
            f"{alone[0]!r}; each stands for itself in statistics; try names like v_CLASS_g01_c01.jpg"
        )
    return [f"{listing.task}/{match[1] if match else name}" for name, match in zip(listing.ids, found)]
