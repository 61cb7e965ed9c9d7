"""Task `folder`: images in a folder, or listed by a CSV file; a local path or an fsspec URL."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence
from functools import partial

from fsspec import AbstractFileSystem

from patchrank.data.image_split import ImageSplit
from patchrank.data.readers.csv_list import read_csv
from patchrank.data.readers.entries import SHARES, Entry, Listing, make_split, read_part
from patchrank.data.readers.file_tree import FileTree, count_others, read_tree
from patchrank.data.readers.img2dataset import is_img2dataset, read_captions
from patchrank.io import filesystem_of, nfc, patiently
from patchrank.utils.errors import UserError
from patchrank.utils.progress import write_once

LIKE_SPLITS = {*SHARES, "training", "valid", "validation", "dev", "eval", "testing"}
NAMED = 5  # classes without images that are named


def load_folder(task: str, split: str, root: str | None) -> ImageSplit:
    """A split of a folder of images or of a CSV file, sorted by id; `make_split` says which splits there are.

    In a folder, an image is a file with an image's ending that is neither hidden nor in a system's folder. All other
    files are counted in `passed_over`. Its class is the first folder of its path below the root, however deep it lies;
    images directly in the root have no label. A first folder without images is a class too, and named on stderr.

    If all first folders with images are called train, val or test, they are splits, and classes begin below them. If
    only some are, but two or more have names like splits (train, val, test, training, valid, validation, dev, eval or
    testing, in any case; or train2017 and val2017), they are refused, since somebody meant splits. One such folder is
    a class, since trains and tests can be photographed. Folders that img2dataset wrote are no classes, but their images
    have captions.

    Ids and classes are in Unicode's form NFC, whatever form the disk has. Two images whose ids would then be the same
    keep the names that they have on disk.

    A CSV file (root ends with .csv) has a header with the column `path`, relative to the file's own folder or
    absolute. It may have `label` (a class by name), `caption` (a path may repeat, for several), `split`, and `group` (a
    name that images of the same person, video or place share: intervals draw them together). Other columns are not
    read.

    Raises:
        UserError: no root or nothing there, folders of which only some are splits, a CSV file without these columns,
            or what `make_split` refuses.
    """
    if root is None:
        raise UserError(f"data.root is missing: task {task!r} needs a folder of images, or a CSV file that lists them")
    return make_split(task, split, patiently(root, lambda: _found(root)), root)


def _found(root: str) -> Listing:
    filesystem, name = filesystem_of(root)
    if filesystem.isdir(name):
        return _folder(filesystem, name, root)
    if not filesystem.isfile(name):
        raise UserError(f"data.root {root}: there is no such folder or CSV file")
    if not name.lower().endswith(".csv"):
        raise UserError(f"data.root {root}: is a file, but must be a folder of images, or a CSV file that lists them")
    return read_csv(filesystem, posixpath.dirname(name), root)


def _folder(filesystem: AbstractFileSystem, folder: str, root: str) -> Listing:
    """What a folder holds."""
    tree = read_tree(filesystem, folder)
    splits = _are_splits([name.split("/") for name in tree.images], root)
    captions, labelled = {}, True
    if is_img2dataset(tree):
        captions = read_captions(tree, lambda name: read_part(filesystem, posixpath.join(folder, name)), root)
        labelled = False
    same = Counter(map(nfc, tree.images))
    entries = []
    for name in tree.images:
        split, _, inner = name.partition("/") if splits else (None, "", name)
        label = nfc(inner.split("/")[0]) if labelled and "/" in inner else None
        identity = nfc(name) if same[nfc(name)] == 1 else name
        part = partial(read_part, filesystem, posixpath.join(folder, name))
        entries.append(Entry(identity, name, part, label, captions.get(name), split))
    used = {f"{posixpath.splitext(name)[0]}.txt" for name in captions}
    others = count_others([name for name in tree.others if name not in used])
    return Listing(entries, _classes(tree, entries, splits, root), others | tree.passed_over)


def _classes(tree: FileTree, entries: Sequence[Entry], splits: bool, root: str) -> list[str]:
    """The class folders of labelled images; those without images are named on stderr."""
    filled = {entry.label for entry in entries} - {None}
    if not filled:
        return []
    paths = [name.split("/") for name in tree.folders]
    inner = [path[1:] for path in paths if path[0] in SHARES] if splits else paths
    classes = {nfc(path[0]) for path in inner if path}
    empty = sorted(classes - filled)
    if empty:
        more = f" and {len(empty) - NAMED} more" if len(empty) > NAMED else ""
        write_once(
            f"{root}: classes without images: {', '.join(map(repr, empty[:NAMED]))}{more}; they stay classes, so that "
            "labels mean the same; remove these folders if they are none"
        )
    return sorted(classes)


def _are_splits(paths: Sequence[list[str]], root: str) -> bool:
    """Whether the first folders are splits, not classes. Raises `UserError` where some look like splits."""
    folders = sorted({path[0] for path in paths if len(path) > 1})
    others = [f"folder {name}" for name in folders if name not in SHARES]
    others += [f"image {path[0]}" for path in paths if len(path) == 1]
    words = {name: name.lower().rstrip("0123456789") for name in folders}  # COCO has train2017 and val2017
    alike = [name for name in folders if words[name] in LIKE_SPLITS]
    meant = {name if name.lower() in LIKE_SPLITS else words[name] for name in alike}  # test1 and test2 may be classes
    if others and len(meant) > 1:
        raise UserError(
            f"data.root {root}: folders {', '.join(alike)} look like splits, but {others[0]} does not fit: splits "
            "must be called exactly train, val, test, with nothing beside them; or list the images in a CSV file with "
            "a column 'split'"
        )
    return not others
