"""Task `wds`: images in WebDataset tars, local or behind fsspec URLs, read one by one by their byte range."""

from __future__ import annotations

import functools
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import IO

from fsspec import AbstractFileSystem

from patchrank.data.decoding import image_extensions
from patchrank.data.image_split import ImageSplit
from patchrank.data.readers.entries import SHARES, Entry, Listing, make_split, read_part
from patchrank.io import filesystem_of, patiently
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress

TEXT_LIMIT = 1 << 20  # bytes of a label or caption
_NAME = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_DAMAGED = "download or make it again"


@dataclass(frozen=True, slots=True)
class Tar:
    """A tar. stem: what its images' ids start with. split: the folder train, val or test that it lies in."""

    filesystem: AbstractFileSystem
    path: str
    stem: str
    split: str | None = None


@dataclass(slots=True)
class Sample:
    """The members of one key. images: start and end in the tar, by extension. texts: bytes of label and caption."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def load_wds(task: str, split: str, root: str | None) -> ImageSplit:
    """A split of the images in WebDataset tars, sorted by id; `make_split` says which splits there are.

    root: a tar, a brace pattern, several joined by `::`, a glob, or a folder of tars. If a folder has no tars itself,
    but folders train, val or test with tars in them, these are the splits. Each path may be an fsspec URL; `pipe:` is
    refused.

    A sample is all members with one key, which is a member's name up to its first dot, as in WebDataset. It has one
    image, and may have `cls` (a class by number or by name), `txt` (a caption) or `json` with a caption. Other members
    are not read, and nothing is ever unpickled. An id is the tar's path below the folder that all tars share, without
    .tar, and the key.

    Each tar is read once to find its images, several tars at a time.

    Raises:
        UserError: no root or no tars, a tar that is cut off, damaged, packed or without images, a key that stands
            twice, a label or caption that cannot be read, or what `make_split` refuses.
    """
    if root is None:
        raise UserError(f"data.root is missing: task {task!r} needs the path, URL or pattern of WebDataset tars")
    tars = patiently(root, lambda: _tars(root))
    bar = partial(progress, total=len(tars), desc="index tars", unit="tar", delay=2)
    with ThreadPoolExecutor(min(8, len(tars))) as pool:
        entries = [entry for found in bar(pool.map(_entries, tars)) for entry in found]
        return make_split(task, split, Listing(entries), root)


def _tars(root: str) -> list[Tar]:
    """All tars that a root names."""
    from webdataset.shardlists import expand_urls

    try:
        urls = expand_urls(root)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"data.root {root}: braces or variables cannot be filled in ({error})") from error
    filesystem, name = filesystem_of(urls[0])
    if len(urls) == 1 and filesystem.isdir(name):
        return _in_folder(filesystem, name, root)
    places = []
    for filesystem, name in map(filesystem_of, urls):
        is_glob = re.search(r"[*?\[]", name) and not filesystem.exists(name)
        places += [(filesystem, path) for path in (sorted(filesystem.glob(name)) if is_glob else [name])]
    if not places:
        raise UserError(f"data.root {root}: no tar matches this pattern")
    (_, path), count = Counter(places).most_common(1)[0]
    if count > 1:
        raise UserError(f"data.root {root}: {path} stands in it {count} times")
    folders = [posixpath.dirname(path) for _, path in places]
    mixed = len({folder.startswith("/") for folder in folders}) > 1  # on different kinds of file systems
    base = "" if mixed else posixpath.commonpath(folders)
    return [Tar(filesystem, path, _stem(path, base)) for filesystem, path in places]


def _in_folder(filesystem: AbstractFileSystem, folder: str, root: str) -> list[Tar]:
    base = folder.rstrip("/")
    tars = [Tar(filesystem, path, _stem(path, base)) for path in _listing(filesystem, base)]
    if tars:
        return tars
    entries = [entry for entry in filesystem.ls(base, detail=True) if entry["type"] == "directory"]
    folders = {entry["name"].rstrip("/").rpartition("/")[2]: _listing(filesystem, entry["name"]) for entry in entries}
    if not any(folders.get(split) for split in SHARES):
        raise UserError(f"data.root {root}: this folder holds no .tar files, nor do folders train, val or test in it")
    for name in sorted(set(folders) - set(SHARES)):
        if folders[name]:  # they would be left out without a word
            raise UserError(
                f"data.root {root}: folder {name!r} holds tars, but splits must be called train, val or test"
            )
    splits = [(split, path) for split in SHARES for path in folders.get(split, ())]
    return [Tar(filesystem, path, _stem(path, base), split) for split, path in splits]


def _listing(filesystem: AbstractFileSystem, folder: str) -> list[str]:
    return sorted(path for path in filesystem.ls(folder, detail=False) if _NAME.search(path.lower()))


def _stem(path: str, base: str) -> str:
    return _NAME.sub("", posixpath.relpath(path, base) if base else path)


def _entries(tar: Tar) -> list[Entry]:
    """Entries of the samples of a tar that hold an image."""
    url = tar.filesystem.unstrip_protocol(tar.path)
    try:
        samples = patiently(url, lambda: _index(tar.filesystem, tar.path, tar.filesystem.ukey(tar.path)))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{tar.path}: cannot be read as a tar ({error.strerror or 'no such file'})") from error
    entries = []
    for key, sample in samples.items():
        if sample.images:
            where = f"{tar.path}, sample {key!r}"
            plain = [extension for extension in sample.images if "." not in extension]
            found = plain or list(sample.images)
            if len(found) > 1:
                shown = f"{len(found)} images ({', '.join(found)})"
                raise UserError(f"{where}: holds {shown}; a key ends at the first dot of a name")
            read = partial(read_part, tar.filesystem, tar.path, *sample.images[found[0]])
            about = _label(sample, where), _caption(sample, where), tar.split
            entries.append(Entry(f"{tar.stem}/{key}", where, read, *about))
    if not entries:
        raise UserError(f"{tar.path}: holds no images; try members that are called as in key.jpg or key.png")
    return entries


def _label(sample: Sample, where: str) -> int | str | None:
    if "cls" not in sample.texts:
        return None
    text = _text(sample, "cls", where)
    if not text or re.fullmatch(r"-\d+", text):
        raise UserError(f"{where}: cls is {text!r}, but must be a class by its number from 0, or by its name")
    if not re.fullmatch("[0-9]+", text):
        return text
    digits = text.lstrip("0") or "0"
    if len(digits) > 10 or int(digits) >= 1 << 31:
        raise UserError(f"{where}: cls is the number {text[:40]}, but classes are numbered from 0, below 2**31")
    return int(digits)


def _caption(sample: Sample, where: str) -> str | None:
    if "txt" in sample.texts:
        return _text(sample, "txt", where)
    try:
        about = json.loads(sample.texts.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: json is not readable ({error})") from error
    caption = about.get("caption") if isinstance(about, dict) else None
    return caption if isinstance(caption, str) else None


def _text(sample: Sample, extension: str, where: str) -> str:
    try:
        return sample.texts[extension].decode().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {extension} is not text in UTF-8") from error


@functools.lru_cache(maxsize=1024)
def _index(filesystem: AbstractFileSystem, path: str, version: str) -> dict[str, Sample]:
    """The samples of a tar by key. Each version of a file is read once."""
    from webdataset.tariterators import base_plus_ext

    samples: dict[str, Sample] = {}
    previous = None
    with filesystem.open(path, "rb") as file:
        for member, content in _members(file, path):
            key, extension = base_plus_ext(member.name)
            if key is None or re.match(r"__[^/]*__($|/)", member.name):  # no dot, or WebDataset's own notes
                continue
            extension = extension.lower()
            sample = samples.get(key, Sample())
            if extension in sample.images or extension in sample.texts or (key in samples and key != previous):
                raise UserError(f"{path}, member {member.name}: key {key!r} stands twice, or its members apart")
            samples[key], previous = sample, key
            if content is not None:
                sample.texts[extension] = content
            elif f".{extension.rpartition('.')[2]}" in image_extensions():
                sample.images[extension] = (member.offset_data, member.offset_data + member.size)
    return samples


def _members(file: IO[bytes], path: str) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Files in a tar, with their bytes where they are texts. Raises `UserError` for a tar that is cut off."""
    last = "its first member"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                last = f"member {member.name}"
                if member.issparse():
                    raise UserError(f"{path}, {last}: is stored with holes; pack the tar without --sparse")
                is_text = member.name.rpartition("/")[2].partition(".")[2].lower() in ("cls", "txt", "json")
                if is_text and member.isreg() and member.size > TEXT_LIMIT:
                    says = f"is {member.size} bytes long, but a text may have {TEXT_LIMIT}"
                    raise UserError(f"{path}, {last}: {says}")
                if member.isreg():
                    yield member, tar.extractfile(member).read() if is_text else None
            _check_end(file, tar.offset, path, last)
    except tarfile.TarError as error:
        raise UserError(f"{path}, {last}: {_reason(file, error)}") from error


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
