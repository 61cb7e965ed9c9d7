"""What an exported file says of itself. Needs no torch.

One JSON object lies in the file: in ONNX as metadata under `KEY`, in a `.pt2` archive as `extra/patchrank.json`. It has
the model and the fingerprints of its weights, all pruning settings and the schedule, classes and templates, and what an
image must go through (`input`).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from patchrank.utils.errors import UserError, near

KEY = "patchrank"
EXTRA = f"{KEY}.json"  # its name among the extra files of a .pt2 archive
SCHEMA = 1
FORMATS = ("onnx", "pt2")
NEEDED = {"schema": int, "format": str, "precision": str, "model": str, "weights": dict, "settings": dict}
NEEDED |= {"num_patches": list, "classes": list, "templates": list, "input": dict, "outputs": list}
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
    if not _fits(found, NEEDED) or not _fits(found["input"], IMAGES):
        raise UserError(f"{path}: was not written by patchrank.export, or its metadata is damaged; try to export anew")
    if found["schema"] != SCHEMA:
        theirs = found["schema"]
        raise UserError(
            f"{path}: has metadata of schema {theirs!r}, but this version reads {SCHEMA}; try to export anew"
        )
    return found


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
