"""The registry of predictors, their files (weights, and the tower that they were fitted to), and what several share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from patchrank.config import DEFAULTS
from patchrank.io.tensor_file import read_tensors, write_tensors
from patchrank.layers.registry import Registry
from patchrank.utils.errors import UserError, near

PREDICTORS = Registry("predictor", always=("embed_dim", "grid_size"))
# A decorator: makes a module class available to `create_predictor`, and so to YAML, by name. If the class takes other
# arguments than `embed_dim` and `grid_size`, it keeps them in an attribute `settings`, so that a tower can be saved.
register_predictor = PREDICTORS.register
USUAL = DEFAULTS.predictor  # the settings of predictors where nobody gives others
ABOUT = ("name", "kwargs", "grid", "embed_dim", "location", "metric", "model")  # keys of a file's metadata
UNFILLED = (
    "the predictor has no weights: predictor_init only describes it, and no checkpoint with its weights was loaded; "
    "create the tower with pretrained=True, or give predictor_path"
)


def create_predictor(name: str, embed_dim: int, grid_size: tuple[int, int], **kwargs) -> nn.Module:
    """Builds a registered predictor for patch tokens of width `embed_dim` on a grid of `grid_size`.

    Raises:
        UserError: an unknown name, or a setting that this predictor does not have.
    """
    return PREDICTORS.create(name, embed_dim=embed_dim, grid_size=tuple(grid_size), **kwargs)


def name_and_settings(predictor: nn.Module) -> tuple[str, dict]:
    """The name and settings from which `create_predictor` makes a module like this one.

    Raises:
        UserError: its class is not registered, or takes settings and has no attribute `settings`.
    """
    name = PREDICTORS.name_of(predictor)
    takes = set(inspect.signature(type(predictor)).parameters) - set(PREDICTORS.always)
    if takes and not hasattr(predictor, "settings"):
        raise UserError(f"predictor {name!r} takes {', '.join(sorted(takes))}, but has no attribute `settings`")
    return name, dict(getattr(predictor, "settings", {}))


def check_location(name: str, location: int) -> None:
    """Refuses a predictor that reads the class token alone before layer 1, where that token has seen no image yet.

    Raises:
        UserError: such a predictor at location 1, or an unknown name.
    """
    if location == 1 and getattr(PREDICTORS.find(name), "reads_cls", False):
        others = [other for other, kind in PREDICTORS.items() if not getattr(kind, "reads_cls", False)]
        raise UserError(
            f"predictor {name!r} ranks by the class token alone, which has seen no image before layer 1: "
            f"choose a first location from 2 on, or one of {', '.join(sorted(others))}"
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


def narrowing(embed_dim: int, dim: int) -> nn.Module:
    """A linear layer from tokens of width `embed_dim` to `dim` channels; the identity where the widths are equal."""
    return nn.Linear(embed_dim, dim) if dim != embed_dim else nn.Identity()


class Head(nn.Linear):
    """One number per token from its channels: (B, N, dim) to (B, N)."""

    def __init__(self, dim: int):
        super().__init__(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)


class Mean(nn.Module):
    """The mean over the channels of each token, as eq. 7 has it: (B, N, dim) to (B, N)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


def create_head(name: str, head: str, dim: int) -> nn.Module:
    """A head of predictor `name`: `linear` weighs the channels, `mean` averages them as the paper does."""
    if head not in ("linear", "mean"):
        known = near(head, ("linear", "mean"))
        raise UserError(f"head of {name} must be 'linear' or 'mean', but is {head!r}; {known}")
    return Head(dim) if head == "linear" else Mean()


def linear_macs(module: nn.Module, rows: int) -> int:
    """MACs of all linear layers in `module` where each of them runs over `rows` rows."""
    sized = (layer for layer in module.modules() if hasattr(layer, "in_features"))  # quantised ones are no nn.Linear
    return sum(rows * layer.in_features * layer.out_features for layer in sized)
