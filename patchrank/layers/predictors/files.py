"""Predictor files: safetensors with one JSON metadata key that says what the weights belong to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from patchrank.errors import UserError
from patchrank.files import read_bytes, write_atomic
from patchrank.layers.predictors.base import create_predictor

ABOUT = ("name", "kwargs", "grid", "embed_dim", "location", "metric", "model")  # what a predictor's file says of it
UNFILLED = (
    "the predictor has no weights: predictor_init only describes it, and no checkpoint with its weights was loaded; "
    "create the tower with pretrained=True, or give predictor_path"
)


def save_predictor(predictor: nn.Module, path: str | Path, about: dict) -> None:
    """Writes weights and, as one JSON metadata key, what they belong to; `load_predictor` reads it back.

    Args:
        about: `name`, `kwargs`, `grid`, `embed_dim`, `location`, `metric` and `model` (its `name` and `sha256`).
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in predictor.state_dict().items()}
    metadata = {"schema": 1, "kind": "predictor", **about}
    write_atomic(path, save(tensors, {"patchrank": json.dumps(metadata, sort_keys=True)}))


def load_predictor(path: str | Path) -> tuple[nn.Module, dict]:
    """The predictor in a file and what was said about it; never unpickles.

    Raises:
        UserError: the file is missing, is no safetensors file, or holds something other than a predictor.
    """
    try:
        content = read_bytes(path)
        tensors, about = load(content), _metadata(content)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"predictor file {path}: cannot be read ({error})") from error
    if about.get("kind") != "predictor" or about.get("schema") != 1:
        raise UserError(f"predictor file {path}: its metadata names no predictor of schema 1, but {about or 'nothing'}")
    lacking = [key for key in ABOUT if key not in about]
    if lacking:
        raise UserError(f"predictor file {path}: its metadata lacks {', '.join(lacking)}")
    try:
        predictor = _create_described(about)
        predictor.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"predictor file {path}: weights and metadata do not fit together ({reason})") from error
    return predictor.eval(), about


def create_awaiting(about: Mapping) -> nn.Module:
    """The predictor that a record describes, to be filled by the checkpoint of the tower that it is a part of.

    Until all its weights have been loaded it refuses to rank.

    Args:
        about: `name`, `kwargs`, `grid` and `embed_dim`, as in a predictor's file.

    Raises:
        UserError: the record is not one of a predictor.
    """
    try:
        predictor = _create_described(about)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"predictor_init: describes no predictor ({error})") from error
    for value in predictor.state_dict().values():
        if value.is_floating_point():
            value.fill_(math.nan)  # so that a part that nothing was loaded into can be told
    if _has_gaps(predictor):
        predictor.refusal = predictor.register_forward_pre_hook(_refuse)
        predictor.register_load_state_dict_post_hook(_accept)
    return predictor.eval()


def awaits_weights(module: nn.Module) -> bool:
    """Whether a predictor inside of `module` was described and never filled."""
    return any(hasattr(part, "refusal") for part in module.modules())


def _refuse(predictor: nn.Module, args: tuple) -> None:
    raise UserError(UNFILLED)


def _accept(predictor: nn.Module, incompatible_keys: object) -> None:
    """Lifts the refusal once nothing is left unfilled."""
    if hasattr(predictor, "refusal") and not _has_gaps(predictor):
        predictor.refusal.remove()
        del predictor.refusal


def _has_gaps(predictor: nn.Module) -> bool:
    return any(value.isnan().any() for value in predictor.state_dict().values())


def _create_described(about: Mapping) -> nn.Module:
    return create_predictor(about["name"], about["embed_dim"], tuple(about["grid"]), **about["kwargs"])


def _metadata(content: bytes) -> dict:
    """What the header of a safetensors file says under our key: 8 bytes of length, then JSON."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header.get("__metadata__", {}).get("patchrank", "{}"))
