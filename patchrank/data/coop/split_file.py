"""CoOp's `split_zhou_*.json`: train, val and test as lists of `[image path, label, class name]`; all rows are checked.

Six datasets have such a file. It cannot be made again: CoOp drew it at random from an unsorted listing.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from patchrank.data.coop.listing import DatasetFolders, Listing
from patchrank.io import nfc, read_text
from patchrank.utils.errors import UserError

PARTS = ("train", "val", "test")
NEVER_INVENTED = " (no split is made up in its place: CoOp drew this one at random)"

Rows = list[tuple[str, int, str]]


def list_coop_split(folders: DatasetFolders, split: str, images: str, file: str) -> Listing:
    """One split of a dataset, from its split file `file`; images lie in the folder `images`.

    Raises:
        UserError: either is missing, or the split file is not as CoOp writes it.
    """
    source = folders.find(file, why=NEVER_INVENTED)
    parts = read_coop_split(source)
    ids, labels, _ = map(list, zip(*parts[split]))
    return Listing(folders.task, source, folders.find(images, probe=ids[0]), ids, labels, class_names(source, parts))


def read_coop_split(path: str) -> dict[str, Rows]:
    """The rows of all three splits. Raises `UserError` that names the first row that breaks a rule."""
    content = read_text(path)
    try:
        parts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(parts, dict) or set(parts) != set(PARTS):
        raise UserError(f"{path}: must be an object with the keys {', '.join(PARTS)} and no others")
    for part in PARTS:
        if not isinstance(parts[part], list) or not parts[part]:
            raise UserError(f"{path}: {part} must be a list of at least one image")
        for place, row in enumerate(parts[part]):
            if rule := _broken_rule(row):
                raise UserError(f"{path}: {part}[{place}] {rule}, but is {repr(row)[:120]}")
    return parts


def _broken_rule(row: object) -> str | None:
    if not isinstance(row, list) or [type(value) for value in row] != [str, int, str]:
        return "must be [image path, whole label, class name]"
    name, label, class_name = row
    if label < 0 or not class_name.strip():
        return "must have a label from 0 and a class name"
    path = PurePosixPath(name)
    # fsspec reads "::" and "://" as another file system
    odd = any(mark in name for mark in ("\\", "\0", ":")) or ".." in path.parts or name.startswith("~")
    if odd or path.is_absolute() or name in ("", ".") or str(path) != name:
        return "must name its image by a path below the image folder"
    return None


def class_names(path: str, parts: dict[str, Rows]) -> tuple[str, ...]:
    """Names by label, from train alone as CoOp takes them.

    Raises:
        UserError: a label has two names, train lacks one that another split has, or its labels leave a gap.
    """
    names = {label: name for _, label, name in parts["train"]}
    for part in PARTS:
        for place, (_, label, name) in enumerate(parts[part]):
            if nfc(names.get(label, "")) != nfc(name):
                other = f"train calls it {names[label]!r}" if label in names else "train has no image of it"
                raise UserError(f"{path}: {part}[{place}] calls label {label} {name!r}, but {other}")
    gap = next((label for label in range(len(names)) if label not in names), None)
    if gap is not None:
        raise UserError(f"{path}: train has {len(names)} labels, which must be 0 to {len(names) - 1}, but has no {gap}")
    return tuple(names[label] for label in range(len(names)))
