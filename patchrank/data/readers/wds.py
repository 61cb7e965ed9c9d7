"""Task `wds`: images in WebDataset tars, local or behind fsspec URLs, read one by one by their byte range."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from fsspec import AbstractFileSystem

from patchrank.data.image_split import ImageSplit
from patchrank.data.readers.entries import SHARES, Entry, Listing, make_split, read_part, shown
from patchrank.data.readers.file_tree import HIDDEN, by_ending, is_hidden
from patchrank.data.readers.tar_samples import read_samples
from patchrank.io import filesystem_of, patiently
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress

_NAME = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$")


@dataclass(frozen=True, slots=True)
class Tar:
    """A tar. stem: what its images' ids start with. split: the folder train, val or test that it lies in."""

    filesystem: AbstractFileSystem
    path: str
    stem: str
    split: str | None = None


def load_wds(task: str, split: str, root: str | None) -> ImageSplit:
    """A split of the images in WebDataset tars, sorted by id; `make_split` says which splits there are.

    root: a tar, a brace pattern, several joined by `::`, a glob, or a folder of tars. If a folder has no tars itself,
    but folders train, val or test with tars in them, these are the splits. Each path may be an fsspec URL; `pipe:` is
    refused.

    A sample is all members with one key, which is a member's name up to its first dot, as in WebDataset. It has an
    image, and may have `cls` (a class by number or by name), `txt` (a caption in each line) or `json` with captions.
    Other members of the key are not read, and nothing is ever unpickled. Images `a.v1.jpg` and `a.v2.jpg` of one key
    are samples of their own, each with the labels and captions of its name (`a.v1.cls`); docs/data.md has all rules.
    Members that are part of no sample, and other files in a folder of tars, are counted in `passed_over`. An id is the
    tar's path below the folder that all tars share, without .tar, and the sample's name.

    Each tar is read once to find its images, several tars at a time.

    Raises:
        UserError: no root or no tars, what `read_samples` refuses, a tar without images, or what `make_split` refuses.
    """
    if root is None:
        raise UserError(f"data.root is missing: task {task!r} needs the path, URL or pattern of WebDataset tars")
    tars, passed_over = patiently(root, lambda: _tars(root))
    bar = partial(progress, total=len(tars), desc="index tars", unit="tar", delay=2)
    entries = []
    with ThreadPoolExecutor(min(8, len(tars))) as pool:
        for found in bar(pool.map(_entries, tars)):
            entries += found.entries
            passed_over.update(found.passed_over)
    return make_split(task, split, Listing(entries, passed_over=dict(sorted(passed_over.items()))), root)


def _tars(root: str) -> tuple[list[Tar], Counter[str]]:
    """All tars that a root names, and what else lies beside them in a folder, by why it is passed over."""
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
    return [Tar(filesystem, path, _stem(path, base)) for filesystem, path in places], Counter()


def _in_folder(filesystem: AbstractFileSystem, folder: str, root: str) -> tuple[list[Tar], Counter[str]]:
    base, passed_over = folder.rstrip("/"), Counter()
    tars, folders = _listing(filesystem, base, passed_over)
    if tars:
        passed_over.update("folders beside tars" for _ in folders)
        return [Tar(filesystem, path, _stem(path, base)) for path in tars], passed_over
    splits, strange = [], []
    for path in folders:
        name, inside = posixpath.basename(path), Counter()
        tars, below = _listing(filesystem, path, inside)
        if name in SHARES:
            splits += [Tar(filesystem, tar, _stem(tar, base), name) for tar in tars]
            passed_over.update(inside)
            passed_over.update("folders beside tars" for _ in below)
        else:
            strange += [name] if tars else []
            passed_over["folders beside tars"] += 1
    if not splits:
        raise UserError(f"data.root {root}: this folder holds no .tar files, nor do folders train, val or test in it")
    if strange:  # their images would be left out
        raise UserError(
            f"data.root {root}: folder {strange[0]!r} holds tars, but splits must be called train, val or test"
        )
    return splits, passed_over


def _listing(filesystem: AbstractFileSystem, folder: str, passed_over: Counter[str]) -> tuple[list[str], list[str]]:
    """The tars in a folder and the folders in it, both sorted; other files are counted."""
    tars, folders = [], []
    for entry in filesystem.ls(folder, detail=True):
        path = entry["name"].rstrip("/")
        name = posixpath.basename(path)
        if path == folder.rstrip("/"):  # stores may list the folder itself
            continue
        if is_hidden(name):
            passed_over[HIDDEN] += 1
        elif _NAME.search(name.lower()):
            tars.append(path)
        elif entry["type"] == "directory":
            folders.append(path)
        else:
            passed_over[by_ending(name)] += 1
    return sorted(tars), sorted(folders)


def _stem(path: str, base: str) -> str:
    return _NAME.sub("", posixpath.relpath(path, base) if base else path)


def _entries(tar: Tar) -> Listing:
    """Entries of the samples of a tar, and what is part of none."""
    url = tar.filesystem.unstrip_protocol(tar.path)
    try:
        found = patiently(url, lambda: read_samples(tar.filesystem, tar.path, tar.filesystem.ukey(tar.path)))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{tar.path}: cannot be read as a tar ({error.strerror or 'no such file'})") from error
    samples, passed_over = found
    if not samples:
        others = f"; passed over: {shown(passed_over)}" if passed_over else ""
        raise UserError(f"{tar.path}: holds no images{others}; try members that are called as in key.jpg or key.png")
    entries = []
    for sample in samples:
        read = partial(read_part, tar.filesystem, tar.path, sample.start, sample.end)
        where = f"{tar.path}, sample {sample.name!r}"
        entries.append(Entry(f"{tar.stem}/{sample.name}", where, read, sample.label, sample.captions, tar.split))
    return Listing(entries, passed_over=passed_over)
