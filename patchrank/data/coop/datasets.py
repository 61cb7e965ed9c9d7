"""The table of named datasets: folders, how to list a split, prompt and sizes of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from patchrank.data.coop.listing import DatasetFolders, Listing, how_to_get
from patchrank.data.coop.official_lists import list_aircraft, list_imagenet
from patchrank.data.coop.split_file import PARTS, list_coop_split
from patchrank.data.image_split import ImageSplit
from patchrank.utils.errors import UserError, near
from patchrank.utils.progress import write_line


@dataclass(frozen=True)
class NamedDataset:
    """How one dataset is read.

    folders: names of its folder under the root, CoOp's first, then torchvision's. listing: lists one split.
    prompt: the one that CoOp's zero-shot CLIP uses. sizes: classes, and images in train, val and test, in CoOp's own
    copy. own_val: False where val is test. group: regular expression over image paths; images with the same first
    group are drawn together in statistics. None: each image is drawn alone.
    """

    folders: tuple[str, ...]
    listing: Callable[[DatasetFolders, str], Listing]
    prompt: str
    sizes: tuple[int, int, int, int]
    own_val: bool = True
    group: str | None = None


def _coop(images: str, file: str) -> Callable[[DatasetFolders, str], Listing]:
    return partial(list_coop_split, images=images, file=f"split_zhou_{file}.json")


NAMED: dict[str, NamedDataset] = {
    "caltech101": NamedDataset(
        ("caltech-101", "caltech101"),
        _coop("101_ObjectCategories", "Caltech101"),
        "a photo of a {}.",
        (100, 4128, 1649, 2465),
    ),
    "oxford_pets": NamedDataset(
        ("oxford_pets", "oxford-iiit-pet"),
        _coop("images", "OxfordPets"),
        "a photo of a {}, a type of pet.",
        (37, 2944, 736, 3669),
    ),
    "flowers102": NamedDataset(
        ("oxford_flowers", "flowers-102"),
        _coop("jpg", "OxfordFlowers"),
        "a photo of a {}, a type of flower.",
        (102, 4093, 1633, 2463),
    ),
    "food101": NamedDataset(
        ("food-101",),
        _coop("images", "Food101"),
        "a photo of {}, a type of food.",
        (101, 50_500, 20_200, 30_300),
    ),
    "fgvc_aircraft": NamedDataset(
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data"),
        list_aircraft,
        "a photo of a {}, a type of aircraft.",
        (100, 3334, 3333, 3333),
    ),
    "dtd": NamedDataset(
        ("dtd", "dtd/dtd"),
        _coop("images", "DescribableTextures"),
        "{} texture.",
        (47, 2820, 1128, 1692),
    ),
    "ucf101": NamedDataset(
        ("ucf101",),
        _coop("UCF-101-midframes", "UCF101"),
        "a photo of a person doing {}.",
        (101, 7639, 1898, 3783),
        group=r".*/v_(\w+_g\d+)_c\d+\.\w+",  # clips of one group were cut from one video
    ),
    "imagenet": NamedDataset(
        ("imagenet",),
        list_imagenet,
        "a photo of a {}.",
        (1000, 1_281_167, 50_000, 50_000),
        own_val=False,
    ),
}


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
    listing = dataset.listing(DatasetFolders(task, str(root), dataset.folders), split)
    images = ImageSplit(task, split, listing.ids, listing.labels, listing.classes, (dataset.prompt,), listing.reader())
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
