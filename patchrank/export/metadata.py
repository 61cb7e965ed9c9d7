"""What an exported file says of itself. Needs no torch.

One JSON object lies in the file: in ONNX as metadata under `KEY`, in a `.pt2` archive as `extra/patchrank.json`. It has
the model and the fingerprints of its weights, all pruning settings and the schedule, classes and templates, and what an
image must go through (`input`).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from patchrank.utils.errors import UserError, near

KEY = "patchrank"
EXTRA = f"{KEY}.json"  # its name among the extra files of a .pt2 archive
SCHEMA = 1
FORMATS = ("onnx", "pt2")
PRECISIONS = ("float32", "int8")
OUTPUTS = ("probabilities", "embedding", "kept")  # in their order; the first and the last may not be there
NEEDED = {"schema": int, "format": str, "precision": str, "model": str, "weights": dict, "settings": dict}
NEEDED |= {"schedule": list, "num_patches": list, "classes": list, "templates": list, "input": dict, "outputs": list}
LISTS = {"num_patches": (int, 2), "classes": (str, None), "templates": (str, None), "outputs": (str, None)}
LISTS_OF_IMAGES = {"size": (int, 2), "mean": (int | float, 3), "std": (int | float, 3)}
IMAGES = {"dtype": str, "size": list, "mean": list, "std": list}
IMAGES |= {"interpolation": str, "crop_pct": int | float, "crop_mode": str}


def format_of(path: str | Path) -> str:
    """The format that a file's ending names. Raises `UserError` for another ending."""
    ending = os.path.splitext(str(path))[1].removeprefix(".").lower()
    if ending not in FORMATS:
        raise UserError(f"{path}: an exported file ends in .onnx or .pt2; {near(ending, FORMATS)}")
    return ending


def parse_metadata(text: str | None, path: str | Path) -> dict:
    """What a file says of itself, from its JSON.

    Raises:
        UserError: the file says nothing, or has another schema.
    """
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        found = None
    if not _is_whole(found, path):
        raise UserError(f"{path}: was not written by patchrank.export, or its metadata is damaged; try to export anew")
    if found["schema"] != SCHEMA:
        theirs = found["schema"]
        raise UserError(
            f"{path}: has metadata of schema {theirs!r}, but this version reads {SCHEMA}; try to export anew"
        )
    return found


def check_graph(about: Mapping, shape: Sequence[object], outputs: Sequence[str] | int, path: str | Path) -> None:
    """Raises `UserError` where a file says that it takes or gives something else than its graph does.

    Args:
        shape: of the images that the graph takes, (B, ...).
        outputs: names of what the graph gives, or how many there are; others may stand behind those of the file.
    """
    side = about["input"]["size"]
    stated = [*side, 3] if about["input"]["dtype"] == "uint8" else [3, *side]
    if list(shape)[1:] != stated:
        raise UserError(f"{path}: says that it takes images {stated}, but takes {list(shape)[1:]}; try to export anew")
    said = about["outputs"]
    if len(said) != outputs if isinstance(outputs, int) else list(outputs)[: len(said)] != said:
        raise UserError(f"{path}: says that it gives {', '.join(said)}, which its graph does not; try to export anew")


def _is_whole(found: object, path: str | Path) -> bool:
    """Whether metadata has all that readers of it look at, of the kinds that they expect."""
    if not _fits(found, NEEDED) or not _fits(found["input"], IMAGES) or found["input"]["crop_pct"] <= 0:
        return False
    if found["format"] != format_of(path) or found["precision"] not in PRECISIONS:
        return False
    given, needed = found["outputs"], {"embedding", *(["probabilities"] if found["classes"] else [])}
    if given != [name for name in OUTPUTS if name in given] or not needed <= set(given):
        return False
    chosen = found.get("choices", [] if found["format"] == "pt2" else None)
    if not isinstance(chosen, list) or not all(_holds(pair, str, 2) for pair in chosen):
        return False
    lists = [(found, LISTS), (found["input"], LISTS_OF_IMAGES)]
    return all(_holds(part[key], *rule) for part, rules in lists for key, rule in rules.items())


def _holds(values: object, kind: type, count: int | None) -> bool:
    """Whether a list has so many values of a kind; None for any number."""
    if not isinstance(values, list) or len(values) != (len(values) if count is None else count):
        return False
    return all(isinstance(value, kind) for value in values)


def _fits(found: object, kinds: Mapping) -> bool:
    """Whether a mapping has values of these kinds by these keys."""
    return isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())


def read_archive(path: str | Path) -> dict:
    """What a `.pt2` archive says of itself; nothing else of it is read.

    Raises:
        UserError: it cannot be read, is no archive, or says nothing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{EXTRA}")]
            text = archive.read(names[0]).decode() if names else None
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no archive of torch.export; try to export anew") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return parse_metadata(text, path)
