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
from patchrank.data.splits import SHARES, Entry, choose
from patchrank.io import filesystem_of, patiently
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress

TEXT_LIMIT = 1 << 20  # bytes of a label or caption
_NAME = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_DAMAGED = "download or make it again"


@dataclass(frozen=True, slots=True)
class Tar:
    """A tar: where it is, what its images' ids start with, and the split it was filed under."""

    filesystem: AbstractFileSystem
    path: str
    stem: str
    split: str | None = None

    @property
    def url(self) -> str:
        return self.filesystem.unstrip_protocol(self.path)

    def read(self, start: int, end: int) -> bytes:
        return patiently(self.url, lambda: self.filesystem.cat_file(self.path, start=start, end=end))


@dataclass(slots=True)
class Sample:
    """What one key of a tar holds: images by extension, each with its start and end in the tar, label and caption."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def load_wds(task: str, split: str, root: str | None) -> ImageSplit:
    """A split of the images in WebDataset tars, sorted by id; `choose` says which splits there are.

    root: a tar, a brace pattern, several joined by `::`, a glob, or a folder of tars; a folder that holds no tars but
    folders of them called train, val or test is split by those. Each path may be an fsspec URL; `pipe:` is refused.

    A sample is all members with one key, which goes to the first dot of a member's name, as WebDataset has it. It holds
    one image, and perhaps `cls` (a class by number or by name), `txt` (a caption) or `json` with a caption; all other
    members stay unread, and nothing is ever unpickled. An id is the tar's name, or its path below the folder that
    holds all tars, without .tar, and the key.

    Each tar is read through once to find its images, several at a time.

    Raises:
        UserError: no root or no tars, a tar that is cut off, damaged, packed or without images, a key that stands
            twice, a label or caption that cannot be read, or what `choose` refuses.
    """
    if root is None:
        raise UserError(f"data.root is missing: task {task!r} needs the path, URL or pattern of WebDataset tars")
    tars = patiently(root, lambda: _tars(root))
    bar = partial(progress, total=len(tars), desc="index tars", unit="tar", delay=2)
    with ThreadPoolExecutor(min(8, len(tars))) as pool:
        return choose(task, split, [entry for entries in bar(pool.map(_entries, tars)) for entry in entries], root)


def _tars(root: str) -> list[Tar]:
    """All tars that a root names, each once."""
    from webdataset.shardlists import expand_urls

    try:
        urls = expand_urls(root)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"data.root {root}: braces or variables cannot be filled in ({error})") from error
    if any(url.startswith("pipe:") for url in urls):
        raise UserError(f"data.root {root}: pipe: would run a shell command, and is refused; give paths or URLs")
    filesystem, name = filesystem_of(urls[0])
    if len(urls) == 1 and filesystem.isdir(name):
        return _in_folder(filesystem, name, root)
    places = [place for url in urls for place in _matches(*filesystem_of(url))]
    if not places:
        raise UserError(f"data.root {root}: no tar matches this pattern")
    (_, path), count = Counter(places).most_common(1)[0]
    if count > 1:
        raise UserError(f"data.root {root}: {path} stands in it {count} times")
    base = _common([path for _, path in places])
    return [Tar(filesystem, path, _stem(path, base)) for filesystem, path in places]


def _matches(filesystem: AbstractFileSystem, path: str) -> list[tuple[AbstractFileSystem, str]]:
    paths = sorted(filesystem.glob(path)) if re.search(r"[*?\[]", path) and not filesystem.exists(path) else [path]
    return [(filesystem, path) for path in paths]


def _in_folder(filesystem: AbstractFileSystem, folder: str, root: str) -> list[Tar]:
    base = folder.rstrip("/")
    tars = [Tar(filesystem, path, _stem(path, base)) for path in _listing(filesystem, base)]
    if not tars:
        _check_folders(filesystem, base, root)
    for split in () if tars else SHARES:
        inner = f"{base}/{split}"
        paths = _listing(filesystem, inner) if filesystem.isdir(inner) else []
        tars += [Tar(filesystem, path, _stem(path, base), split) for path in paths]
    if not tars:
        raise UserError(f"data.root {root}: this folder holds no .tar files, nor do folders train, val or test in it")
    return tars


def _check_folders(filesystem: AbstractFileSystem, base: str, root: str) -> None:
    """Refuses folders of tars beside train, val and test, which would be left out without a word."""
    entries = [entry for entry in filesystem.ls(base, detail=True) if entry["type"] == "directory"]
    folders = {entry["name"].rstrip("/").rpartition("/")[2]: entry["name"] for entry in entries}
    for name in sorted(set(folders) - set(SHARES)) if set(folders) & set(SHARES) else ():
        if _listing(filesystem, folders[name]):
            raise UserError(
                f"data.root {root}: folder {name!r} holds tars, but splits must be called train, val or test"
            )


def _listing(filesystem: AbstractFileSystem, folder: str) -> list[str]:
    return sorted(path for path in filesystem.ls(folder, detail=False) if _NAME.search(path.lower()))


def _common(paths: list[str]) -> str:
    """The folder that holds all these files; "" where they lie on different kinds of file systems."""
    rooted = {path.startswith("/") for path in paths}
    return posixpath.commonpath([posixpath.dirname(path) for path in paths]) if len(rooted) == 1 else ""


def _stem(path: str, base: str) -> str:
    return _NAME.sub("", posixpath.relpath(path, base) if base else path)


def _entries(tar: Tar) -> list[Entry]:
    """Entries of the samples of a tar that hold an image."""
    try:
        samples = patiently(tar.url, lambda: _index(tar.filesystem, tar.path, tar.filesystem.ukey(tar.path)))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{tar.path}: cannot be read as a tar ({error.strerror or 'no such file'})") from error
    entries = [_entry(tar, key, sample) for key, sample in samples.items() if sample.images]
    if not entries:
        raise UserError(f"{tar.path}: holds no images; a member is one if its name ends as in key.jpg or key.png")
    return entries


def _entry(tar: Tar, key: str, sample: Sample) -> Entry:
    where = f"{tar.path}, sample {key!r}"
    read = partial(tar.read, *sample.images[_image_of(sample, where)])
    return Entry(f"{tar.stem}/{key}", where, read, _label(sample, where), _caption(sample, where), tar.split)


def _image_of(sample: Sample, where: str) -> str:
    """The extension of a sample's image: the one without dots where there is one, else the only one."""
    plain = [extension for extension in sample.images if "." not in extension]
    found = plain or list(sample.images)
    if len(found) > 1:
        raise UserError(
            f"{where}: holds {len(found)} images ({', '.join(found)}); a key ends at the first dot of a name"
        )
    return found[0]


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
    """The samples of a tar by key; once for each version of the file."""
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
    """Files in a tar, with their bytes where they are texts; a tar that is cut off is never taken for a short one."""
    last = "its first member"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                last = f"member {member.name}"
                if member.issparse():
                    raise UserError(f"{path}, {last}: is stored with holes; pack the tar without --sparse")
                if member.isreg():
                    yield member, _content(tar, member, path)
            _check_end(file, tar.offset, path, last)
    except tarfile.TarError as error:
        raise UserError(f"{path}, {last}: {_reason(file, error)}") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> bytes | None:
    if member.name.rpartition("/")[2].partition(".")[2].lower() not in ("cls", "txt", "json"):
        return None
    if member.size > TEXT_LIMIT:
        raise UserError(f"{path}, member {member.name}: is {member.size} bytes long, but a text may have {TEXT_LIMIT}")
    return tar.extractfile(member).read()


def _check_end(file: IO[bytes], offset: int, path: str, last: str) -> None:
    """tarfile stops without a word where the next header is missing or damaged; a whole tar ends with zeros."""
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
    packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
    if packed:
        return f"is packed with {packed}, which leaves no way to read one image alone; unpack it to a plain .tar"
    return f"is empty or cut off; {_DAMAGED}" if not head or "unexpected" in str(error) else f"is no tar ({error})"
