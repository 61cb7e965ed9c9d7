"""The layout `files` of img2dataset: numbered folders of downloads, which are no classes, with captions beside them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from patchrank.data.image_split import THREADS
from patchrank.data.readers.file_tree import FileTree
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress, write_once


def is_img2dataset(tree: FileTree) -> bool:
    """Whether all images are called as `00012/000120345.jpg`, and a file tells that img2dataset wrote them.

    The number of an image starts with that of its folder. The file is `00012.parquet` or `00012_stats.json` beside a
    folder, or `000120345.json` beside an image.
    """
    if not all(re.fullmatch(r"(?:(?:train|val|test)/)?([0-9]{5,})/\1[0-9]+\.\w+", name) for name in tree.images):
        return False
    stems = {posixpath.splitext(name)[0] for name in tree.images}
    notes = {f"{folder}{end}" for folder in tree.folders for end in (".parquet", "_stats.json")}
    return any(name in notes or (name.endswith(".json") and name[:-5] in stems) for name in tree.others)


def read_captions(tree: FileTree, read: Callable[[str], bytes], where: str) -> dict[str, tuple[str]]:
    """The one caption of each image by its path, from the `.txt` beside it; none where one has no such file.

    Args:
        read: the bytes of a file by its path.

    Raises:
        UserError: a caption cannot be read, or is no text in UTF-8.
    """
    others, texts = set(tree.others), {}
    for name in tree.images:
        text = f"{posixpath.splitext(name)[0]}.txt"
        if text in others:
            texts[name] = text
    says = f"{where}: read as img2dataset wrote it: {len(tree.images):,} images without labels"
    if texts and len(texts) < len(tree.images):
        write_once(f"{says}; {len(tree.images) - len(texts):,} have no caption beside them, so that none are read")
        return {}
    write_once(f"{says}, {'with' if texts else 'and without'} captions")
    bar = partial(progress, total=len(texts), desc="read captions", unit="caption", delay=2)
    with ThreadPoolExecutor(THREADS) as pool:
        captions = list(bar(pool.map(partial(_caption, read, where), texts.values())))
    return {name: (caption,) for name, caption in zip(texts, captions)}


def _caption(read: Callable[[str], bytes], where: str, name: str) -> str:
    try:
        return read(name).decode("utf-8-sig").strip()
    except OSError as error:
        raise UserError(f"{where}/{name}: cannot be read ({error.strerror or 'no such file'})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}/{name}: is not a text file in UTF-8") from error
