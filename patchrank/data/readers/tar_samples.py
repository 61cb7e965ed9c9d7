"""What one tar holds: images with their labels and captions, and members that are part of no sample."""

from __future__ import annotations

import functools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import IO, NamedTuple

from fsspec import AbstractFileSystem

from patchrank.data.decoding import image_extensions
from patchrank.data.readers.file_tree import HIDDEN, by_ending, is_hidden
from patchrank.io import nfc
from patchrank.utils.errors import UserError

TEXT_LIMIT = 1 << 20  # bytes of a label or caption
TEXTS = ("cls", "txt", "json")
# Endings by which people call labels and captions, too. They are not read: WebDataset gives them no one meaning.
ALIKE = {"class": "cls", "label": "cls", "text": "txt", "transcript": "txt", "caption": "txt", "captions": "txt"}
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_DAMAGED = "download or make it again"


@dataclass(frozen=True, slots=True)
class TarSample:
    """An image in a tar. name: unique in it. start, end: where its bytes lie. captions: None where it has none."""

    name: str
    start: int
    end: int
    label: int | str | None = None
    captions: tuple[str, ...] | None = None


class Member(NamedTuple):
    """A file in a tar: `b/a.V2.JPG` has the key `b/a`, the extension `v2.jpg`, the infix `V2.` and the kind `jpg`.

    start, end: where its bytes lie. text: its bytes, where it may be a label or a caption.
    """

    name: str
    key: str
    extension: str
    infix: str
    kind: str
    start: int
    end: int
    text: bytes | None
    is_image: bool


@functools.lru_cache(maxsize=1024)
def read_samples(filesystem: AbstractFileSystem, path: str, version: str) -> tuple[list[TarSample], Counter[str]]:
    """The samples of a tar, and how many of its files are part of none, by why. Each version of a tar is read once.

    Members belong together by WebDataset's rule: they share their key, which ends at the first dot of a file's name,
    and stand next to each other. `_samples` says which samples that makes.

    Raises:
        UserError: a tar that is cut off, damaged, packed or stored with holes, a key that stands twice, two images of
            one name, or a label or caption that cannot be read.
    """
    samples: list[TarSample] = []
    passed_over: Counter[str] = Counter()
    seen: set[str] = set()
    with filesystem.open(path, "rb") as file:
        for key, group in groupby(_members(file, path, passed_over), key=lambda member: member.key):
            members = list(group)
            again = members[0] if key in seen else _second_of_a_name(members)
            if again is not None:
                says = f"key {key!r} stands twice, or its members apart"
                raise UserError(f"{path}, member {again.name}: {says}")
            seen.add(key)
            samples += _samples(key, members, path, passed_over)
    return samples, passed_over


def _second_of_a_name(members: Sequence[Member]) -> Member | None:
    """The first image, label or caption whose name stands before it already."""
    names = set()
    for member in members:
        if member.extension in names and (member.is_image or member.kind in TEXTS):
            return member
        names.add(member.extension)
    return None


def _members(file: IO[bytes], path: str, passed_over: Counter[str]) -> Iterator[Member]:
    """Files in a tar that may be part of a sample; others are counted. Raises `UserError` for a tar that is cut off."""
    from webdataset.tariterators import base_plus_ext

    last = "its first member"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                last = f"member {info.name}"
                if info.issparse():
                    raise UserError(f"{path}, {last}: is stored with holes; pack the tar without --sparse")
                if info.isdir():  # what lies in it comes as members of their own
                    continue
                key, extension = base_plus_ext(info.name)
                reason = _why_no_member(info, key)
                if reason is not None:
                    passed_over[reason] += 1
                    continue
                infix, dot, kind = extension.rpartition(".")
                about = info.name, key, extension.lower(), infix + dot, kind.lower()
                place = info.offset_data, info.offset_data + info.size
                is_text = kind.lower() in TEXTS and info.size <= TEXT_LIMIT
                text = tar.extractfile(info).read() if is_text else None
                yield Member(*about, *place, text, is_image=f".{kind.lower()}" in image_extensions())
            _check_end(file, tar.offset, path, last)
    except tarfile.TarError as error:
        raise UserError(f"{path}, {last}: {_reason(file, error)}") from error


def _why_no_member(info: tarfile.TarInfo, key: str | None) -> str | None:
    """Why a tar's entry is part of no sample, whatever stands beside it; None for files that may be."""
    if not info.isreg():
        return "links" if info.issym() or info.islnk() else "special files"
    if is_hidden(info.name):
        return HIDDEN
    if re.match(r"__[^/]*__($|/)", info.name):
        return "notes of WebDataset"
    return by_ending(info.name) if key is None else None


def _samples(key: str, members: Sequence[Member], path: str, passed_over: Counter[str]) -> list[TarSample]:
    """The samples of all members of one key; what is part of none is counted.

    - One image is the sample of its key, whatever stands between its dots (`a.jpg`, `a.v2.jpg`).
    - Of several, one without an infix (`a.jpg`) is the sample. The others (`a.mask.png`) are counted, unless they have
      `cls` or `txt` of their own, which makes them samples. Where all have an infix, all are samples. The name of a
      sample with an infix is its key and the infix: `a.v2`.
    - Other members of a key that has an image are part of its sample, but are not read.
    """
    images = [member for member in members if member.is_image]
    if not images:
        passed_over.update(by_ending(member.name) for member in members)
        return []
    own = _texts_of(images, members, path, passed_over)
    has_plain = any(not image.infix for image in images)
    samples = []
    for image in images:
        name = key if len(images) == 1 or not image.infix else f"{key}.{image.infix[:-1]}"
        if image.infix and has_plain and not own[image.name].keys() & {"cls", "txt"}:
            passed_over["further images of a sample"] += 1
        else:
            where = f"{path}, sample {name!r}"
            about = _label(own[image.name], where), _captions(own[image.name], where)
            samples.append(TarSample(name, image.start, image.end, *about))
    for member in members:
        if member.kind in ALIKE:
            passed_over[f"ending .{member.kind} (try .{ALIKE[member.kind]})"] += 1
    return samples


def _texts_of(
    images: Sequence[Member], members: Sequence[Member], path: str, passed_over: Counter[str]
) -> dict[str, dict[str, Member]]:
    """For the name of each image its texts by their kind; what belongs to no image is counted.

    A text belongs to the image of its infix, or else to the image with whose whole name it begins (`a.jpg.cls`), or
    else, without an infix, to the only image of its key.
    """
    shown = f"{len(images)} images ({', '.join(image.extension for image in images)})"
    where = f"{path}, sample {images[0].key!r}"
    by_infix = {image.infix.lower(): image for image in images}
    if len(by_infix) < len(images):
        raise UserError(f"{where}: holds {shown} of one name; try a name for each")
    owners = [by_infix, {f"{image.extension}.": image for image in images}]
    owners += [{"": images[0]}] if len(images) == 1 else []
    own: dict[str, dict[str, Member]] = {image.name: {} for image in images}
    left = [member for member in members if member.kind in TEXTS]
    for owner in owners:
        for text in list(left):
            image = owner.get(text.infix.lower())
            if image is not None and text.kind not in own[image.name]:
                own[image.name][text.kind] = text
                left.remove(text)
    of_all = next((text.kind for text in left if not text.infix), None) if len(images) > 1 else None
    if of_all is not None:
        says = f"{shown}, but one .{of_all} for all, since a key ends at the first dot of a name"
        raise UserError(f"{where}: holds {says}; try one .{of_all} for each image")
    for text in left:
        passed_over[f"ending .{text.kind} beside no image of that name"] += 1
    return own


def _label(texts: dict[str, Member], where: str) -> int | str | None:
    if "cls" not in texts:
        return None
    text = _text(texts["cls"], where)
    if not text or re.fullmatch(r"-\d+", text):
        raise UserError(f"{where}: cls is {text!r}, but must be a class by its number from 0, or by its name")
    if not re.fullmatch("[0-9]+", text):
        return nfc(text)
    digits = text.lstrip("0") or "0"
    if len(digits) > 10 or int(digits) >= 1 << 31:
        raise UserError(f"{where}: cls is the number {text[:40]}, but classes are numbered from 0, below 2**31")
    return int(digits)


def _captions(texts: dict[str, Member], where: str) -> tuple[str, ...] | None:
    """Each line of `txt`, or what `json` has as `caption` or `captions`: one text, or a list of texts.

    Lines are how tars for retrieval keep several captions of an image (those of CLIP_benchmark do).
    """
    if "txt" in texts:
        lines = (line.strip() for line in re.split(r"[\r\n]", _text(texts["txt"], where)))
        return tuple(line for line in lines if line) or ("",)
    try:
        about = json.loads(_checked(texts["json"], where)) if "json" in texts else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: json is not readable ({error})") from error
    for found in (about.get("caption"), about.get("captions")) if isinstance(about, dict) else ():
        captions = found if isinstance(found, list) else [found]
        if captions and all(isinstance(caption, str) for caption in captions):
            return tuple(captions)
    return None


def _text(member: Member, where: str) -> str:
    try:
        return _checked(member, where).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {member.kind} is not text in UTF-8") from error


def _checked(member: Member, where: str) -> bytes:
    """The bytes of a text. Raises `UserError` where they were too many to be read."""
    if member.text is None:
        size = member.end - member.start
        raise UserError(f"{where}, member {member.name}: is {size} bytes long, but a text may have {TEXT_LIMIT}")
    return member.text


def _check_end(file: IO[bytes], offset: int, path: str, last: str) -> None:
    """Checks that a tar ends with zeros: tarfile just stops where the next header is missing or damaged."""
    file.seek(offset)
    block, rest = file.read(tarfile.BLOCKSIZE), file.read(tarfile.RECORDSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise UserError(f"{path}: is cut off after {last}; {_DAMAGED}")
    if any(block):
        raise UserError(f"{path}: is damaged after {last}, at byte {offset}; {_DAMAGED}")
    if any(rest):
        raise UserError(f"{path}: goes on after its end, at byte {offset}, as tars do that were joined; split it")


def _reason(file: IO[bytes], error: tarfile.TarError) -> str:
    file.seek(0)
    head = file.read(8)
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            return f"is packed with {name}, so that no image can be read alone; unpack it to a plain .tar"
    if not head or "unexpected" in str(error):
        return f"is empty or cut off; {_DAMAGED}"
    return f"is no tar ({error})"
