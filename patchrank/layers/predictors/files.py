"""Predictor files: weights, and the tower that they were fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from patchrank.io.tensor_file import read_tensors, write_tensors
from patchrank.layers.predictors.base import create_predictor
from patchrank.utils.errors import UserError

ABOUT = ("name", "kwargs", "grid", "embed_dim", "location", "metric", "model")  # keys of a file's metadata
UNFILLED = (
    "the predictor has no weights: predictor_init only describes it, and no checkpoint with its weights was loaded; "
    "create the tower with pretrained=True, or give predictor_path"
)


def save_predictor(predictor: nn.Module, path: str | Path, about: dict) -> None:
    """Writes weights and, as one JSON metadata key, `about`; `load_predictor` reads both back.

    Args:
        about: `name`, `kwargs`, `grid`, `embed_dim`, `location`, `metric` and `model` (its `name` and `sha256`).
    """
    write_tensors(path, "predictor", predictor.state_dict(), about)


def load_predictor(path: str | Path) -> tuple[nn.Module, dict]:
    """The predictor in a file and its metadata; never unpickles.

    Raises:
        UserError: the file is missing, is no safetensors file, or holds something other than a predictor.
    """
    tensors, about = read_tensors(path, "predictor", ABOUT)
    try:
        predictor = _create_described(about)
        predictor.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"predictor file {path}: weights and metadata do not fit together ({reason})") from error
    return predictor.eval(), about


def create_awaiting(about: Mapping) -> nn.Module:
    """The predictor that a record describes, without weights: the checkpoint of its tower brings them.

    Its attribute `filled` says whether they are there; until then the reducer that has it refuses to rank.

    Args:
        about: `name`, `kwargs`, `grid` and `embed_dim`, as in a predictor's file.

    Raises:
        UserError: the record is not one of a predictor.
    """
    try:
        predictor = _create_described(about)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"predictor_init: describes no predictor ({error})") from error
    predictor.filled = not predictor.state_dict()
    return predictor.eval()


def awaits_weights(module: nn.Module) -> bool:
    """Whether a predictor inside of `module` was described, and no weights were loaded into it yet."""
    return any(not getattr(part, "filled", True) for part in module.modules())


def _create_described(about: Mapping) -> nn.Module:
    return create_predictor(about["name"], about["embed_dim"], tuple(about["grid"]), **about["kwargs"])
