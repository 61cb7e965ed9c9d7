"""Made-up copies of the eight datasets: the real folders, files and names, a few tiny images a class."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

COUNTS = {"train": 3, "val": 1, "test": 2}  # images a class


def jpeg(colour: tuple[int, int, int] = (200, 30, 30), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@dataclass(frozen=True)
class Copy:
    """One of the six datasets with a split file.

    rows: label, class name, and a pattern of image paths, in the order in which the file meets the classes.
    strays: files beside the images and annotations that nobody needs, relative to the dataset's folder.
    """

    folder: str
    torchvision: str | None
    images: str
    file: str
    rows: tuple[tuple[int, str, str], ...]
    strays: tuple[str, ...] = ()

    def split(self) -> dict[str, list[list]]:
        first = {"train": 1, "val": 4, "test": 5}
        return {
            part: [[path.format(first[part] + n), label, name] for label, name, path in self.rows for n in range(count)]
            for part, count in COUNTS.items()
        }


COPIES = {
    "caltech101": Copy(
        "caltech-101",
        "caltech101",
        "101_ObjectCategories",
        "split_zhou_Caltech101.json",
        (
            (0, "face", "Faces/image_{:04d}.jpg"),
            (1, "leopard", "Leopards/image_{:04d}.jpg"),
            (2, "motorbike", "Motorbikes/image_{:04d}.jpg"),
            (3, "accordion", "accordion/image_{:04d}.jpg"),
            (4, "airplane", "airplanes/image_{:04d}.jpg"),
            (5, "yin_yang", "yin_yang/image_{:04d}.jpg"),
        ),
        (
            "101_ObjectCategories/BACKGROUND_Google/tmp",
            "101_ObjectCategories/BACKGROUND_Google/image_0001.jpg",
            "101_ObjectCategories/Faces_easy/image_0001.jpg",
            "Annotations/Faces_2/annotation_0001.mat",
        ),
    ),
    "oxford_pets": Copy(
        "oxford_pets",
        "oxford-iiit-pet",
        "images",
        "split_zhou_OxfordPets.json",
        (
            (0, "abyssinian", "Abyssinian_{}.jpg"),
            (1, "american_bulldog", "american_bulldog_{}.jpg"),
            (2, "yorkshire_terrier", "yorkshire_terrier_{}.jpg"),
        ),
        ("images/Abyssinian_100.mat", "annotations/trainval.txt", "annotations/test.txt"),
    ),
    "flowers102": Copy(
        "oxford_flowers",
        "flowers-102",
        "jpg",
        "split_zhou_OxfordFlowers.json",
        (
            (2, "passion flower", "image_001{:02d}.jpg"),
            (0, "pink primrose", "image_067{:02d}.jpg"),
            (1, "colt's foot", "image_040{:02d}.jpg"),
        ),
        ("imagelabels.mat", "setid.mat", "cat_to_name.json"),
    ),
    "food101": Copy(
        "food-101",
        "food-101",
        "images",
        "split_zhou_Food101.json",
        ((0, "apple_pie", "apple_pie/100{}.jpg"), (1, "waffles", "waffles/200{}.jpg")),
        ("meta/classes.txt", "meta/train.json", "meta/test.json", "license_agreement.txt"),
    ),
    "dtd": Copy(
        "dtd",
        "dtd/dtd",
        "images",
        "split_zhou_DescribableTextures.json",
        (
            (0, "banded", "banded/banded_{:04d}.jpg"),
            (1, "polka-dotted", "polka-dotted/polka-dotted_{:04d}.jpg"),
            (2, "zigzagged", "zigzagged/zigzagged_{:04d}.jpg"),
        ),
        ("images/.directory", "images/banded/.directory", "labels/train1.txt", "imdb/imdb.mat"),
    ),
    "ucf101": Copy(
        "ucf101",
        None,
        "UCF-101-midframes",
        "split_zhou_UCF101.json",
        (
            (0, "Apply_Eye_Makeup", "Apply_Eye_Makeup/v_ApplyEyeMakeup_g08_c{:02d}.jpg"),
            (1, "Hammering", "Hammering/v_Hammering_g08_c{:02d}.jpg"),
            (2, "Hammer_Throw", "Hammer_Throw/v_HammerThrow_g08_c{:02d}.jpg"),
            (3, "Handstand_Pushups", "Handstand_Pushups/v_HandStandPushups_g08_c{:02d}.jpg"),
        ),
        ("ucfTrainTestlist/classInd.txt", "ucfTrainTestlist/trainlist01.txt", "ucfTrainTestlist/testlist01.txt"),
    ),
}
VARIANTS = ("707-320", "Beechcraft 1900", "F-16A/B", "Yak-42")
AIRCRAFT = {  # not in the order of variants.txt
    "train": (("0056978", "Yak-42"), ("1025794", "707-320"), ("0034309", "F-16A/B"), ("0900914", "Beechcraft 1900")),
    "val": (("0450014", "Beechcraft 1900"), ("0698580", "707-320")),
    "test": (("1514522", "F-16A/B"), ("0747566", "Yak-42"), ("1008575", "707-320")),
}
WNIDS = {  # in the order of classnames.txt, which need not be sorted
    "n04357314": "sunglasses",
    "n01440764": "tench",
    "n02113978": "Mexican hairless dog (xoloitzcuintli)",
    "n04355933": "sunglasses",
}


def write(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_split(root: Path, task: str, split: object = None) -> Path:
    """The split file, in CoOp's folder; `split` instead of the sound one."""
    copy = COPIES[task]
    return write(root / copy.folder / copy.file, json.dumps(split or copy.split(), indent=4))


def make_named(root: Path, task: str, torchvision: bool = False) -> Path:
    """A copy of a dataset under `root`; returns its own folder."""
    if task == "fgvc_aircraft":
        return make_aircraft(root / ("fgvc-aircraft-2013b/data" if torchvision else "fgvc_aircraft"))
    if task == "imagenet":
        return make_imagenet(root if torchvision else root / "imagenet", "" if torchvision else "images")
    copy = COPIES[task]
    folder = root / (copy.torchvision if torchvision else copy.folder)
    for rows in copy.split().values():
        for path, label, _ in rows:
            write(folder / copy.images / path, jpeg((40 * label, 90, 200)))
    for stray in copy.strays:
        write(folder / stray, b"\x00not needed")
    write(folder / copy.file, json.dumps(copy.split(), indent=4))
    return folder


def make_aircraft(folder: Path) -> Path:
    write(folder / "variants.txt", "\n".join(VARIANTS) + "\n")
    for split, rows in AIRCRAFT.items():
        write(folder / f"images_variant_{split}.txt", "".join(f"{number} {variant}\n" for number, variant in rows))
        write(folder / f"images_family_{split}.txt", "0056978 Yakovlev\n")
        for number, _ in rows:
            write(folder / "images" / f"{number}.jpg", jpeg())
    return folder


def make_imagenet(folder: Path, images: str) -> Path:
    write(folder / "classnames.txt", "".join(f"{wnid} {name}\n" for wnid, name in WNIDS.items()))
    for wnid in WNIDS:
        for name in (f"{wnid}_18.JPEG", f"{wnid}_4.JPEG", f"{wnid}_301.JPEG", f"._{wnid}_4.JPEG", "notes.txt"):
            write(folder / images / "train" / wnid / name, jpeg())
        write(folder / images / "val" / wnid / "ILSVRC2012_val_00000293.JPEG", jpeg(kind="PNG"))
    write(folder / images / "train" / "n01440764.tar", b"")
    return folder
