"""Small files of tensors: safetensors, with one JSON metadata key that says what the tensors are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from patchrank.io import read_bytes, write_atomic
from patchrank.utils.errors import StoreError, UserError

KEY, SCHEMA = "patchrank", 1


def write_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping) -> None:
    """Writes tensors and, as JSON under one metadata key, `about`; whole or not at all."""
    content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {"schema": SCHEMA, "kind": kind, **about}
    write_atomic(path, save(content, {KEY: json.dumps(metadata, sort_keys=True)}))


def read_tensors(path: str | Path, kind: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], dict]:
    """The tensors in a file of some kind, and its metadata; never unpickles.

    Args:
        kind: the kind that the metadata must name.
        needs: keys that the metadata must have.

    Raises:
        UserError: the file is missing, damaged, no safetensors file, or of another kind.
    """
    try:
        content = read_bytes(path)
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # after 8 bytes of its length
        about = json.loads(header.get("__metadata__", {}).get(KEY, "{}"))
        about = about if isinstance(about, dict) else {}
    except StoreError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{kind} file {path}: cannot be read ({error})") from error
    if about.get("kind") != kind or about.get("schema") != SCHEMA:
        found = ", ".join(f"{key} {str(about[key])[:40]!r}" for key in ("kind", "schema") if key in about) or "nothing"
        raise UserError(f"{kind} file {path}: its metadata names no {kind} of schema {SCHEMA}, but {found}")
    lacking = [key for key in needs if key not in about]
    if lacking:
        raise UserError(f"{kind} file {path}: its metadata lacks {', '.join(lacking)}")
    return tensors, about
