"""The files that a path means: one file, a folder as the Hugging Face hub fills it, or shards.

Large models are saved as shards, `model-00001-of-00003.safetensors` and so on, beside an index that says which weight
lies in which shard.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from patchrank.io import filesystem_of, is_remote, join, list_names, patiently, read_bytes
from patchrank.models.checkpoints.hub import CLIP_MODEL_FILES, OPEN_CLIP_FILES
from patchrank.utils.errors import UserError

INDEX = re.compile(r".+\.index(\.\w+)?\.json")
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")
# Of a folder the first that is there is read: open_clip's pairs first, and safetensors before pickles.
IN_FOLDERS = (*OPEN_CLIP_FILES, *(f"{name}{index}" for name in CLIP_MODEL_FILES for index in ("", ".index.json")))
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # of files that an error proposes
MAX_SHARDS = 10_000


class Part(NamedTuple):
    """A file that holds some of the weights, or all.

    path: local path or URL.
    names: the weights that are read from it; None where that is all of them.
    """

    path: str
    names: set[str] | None = None


def find_parts(path: str | Path, source: str) -> list[Part]:
    """The files that hold the weights of a path; it is itself the only one if it is an ordinary file or is not there.

    Args:
        path: local path or fsspec URL of a file, of a folder, of an index or of one of several shards.
        source: what errors call it.

    Raises:
        UserError: a folder without weights, or an index that is damaged or names files outside of its folder.
        OSError: the folder or index cannot be read.
    """
    path = str(path)
    if _is_folder(path):
        path = join(path, _file_of_folder(path, source))
    folder, _, name = path.rpartition("/")
    if INDEX.fullmatch(name):
        return _parts_of_index(path, source)
    shard = SHARD.fullmatch(name)
    if not shard or int(shard["count"]) > MAX_SHARDS:
        return [Part(path)]
    count = int(shard["count"])
    names = [f"{shard['stem']}-{number:05d}-of-{count:05d}{shard['suffix']}" for number in range(1, count + 1)]
    return [Part(join(folder, name) if folder else name) for name in names]


def _is_folder(path: str) -> bool:
    """Whether a path or URL is a folder. A web page has none: `isdir` would download it to look for links."""
    filesystem, name = filesystem_of(path)
    if not is_remote(path):
        return Path(name).is_dir()
    try:
        return patiently(path, lambda: filesystem.info(name))["type"] == "directory"
    except FileNotFoundError:
        return False


def _file_of_folder(folder: str, source: str) -> str:
    """The name of the file that a folder is read from."""
    inside = list_names(folder)
    for name in IN_FOLDERS:
        if name in inside:
            return name
    likely = [name for name in inside if name.endswith(SUFFIXES) or INDEX.fullmatch(name)]
    hint = f"try {join(folder, likely[-1])}" if likely else "try the path of the file that holds the weights"
    raise UserError(f"{source}: is a folder with none of {', '.join(IN_FOLDERS)}; {hint}")


def _parts_of_index(path: str, source: str) -> list[Part]:
    """The shards that an index names, each with its weights."""
    content, named = read_bytes(path), defaultdict(set)
    try:
        for name, shard in json.loads(content)["weight_map"].items():
            named[str(shard)].add(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        says = "is no index of shards: 'weight_map' is missing or damaged; try to download it again"
        raise UserError(f"{source}: {path} {says}") from error
    for shard in named:
        if not shard.endswith(SUFFIXES) or re.search(r"[/\\:]", shard):
            says = f"names {shard[:80]!r}, which is no file of weights in its own folder"
            raise UserError(f"{source}: the index {says}; try to download it again")
    folder = path.rpartition("/")[0] or "."
    return [Part(join(folder, shard), names) for shard, names in sorted(named.items())]
