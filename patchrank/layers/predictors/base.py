"""The registry of predictors, and what several of them share."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from patchrank.config import DEFAULTS
from patchrank.utils.errors import UserError, near

PREDICTORS: dict[str, type[nn.Module]] = {}
HEADS = ("linear", "mean")
USUAL = DEFAULTS.predictor  # the settings of predictors where nobody gives others


def register_predictor(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Makes a module class available to `create_predictor`, and so to YAML, under `name`.

    One that takes arguments beside `embed_dim` and `grid_size` keeps them by name in an attribute `settings`, so that
    a tower can be saved with it.
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        PREDICTORS[name] = cls
        return cls

    return register


def create_predictor(name: str, embed_dim: int, grid_size: tuple[int, int], **kwargs) -> nn.Module:
    """Builds a registered predictor for patch tokens of width `embed_dim` on a grid of `grid_size`.

    Raises:
        UserError: an unknown name, or a setting that this predictor does not have.
    """
    kind = _find(name)
    arguments = {"embed_dim": embed_dim, "grid_size": tuple(grid_size), **kwargs}
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        settings = [key for key in inspect.signature(kind).parameters if key not in ("embed_dim", "grid_size")]
        raise UserError(f"predictor {name!r} {error}; its settings: {', '.join(settings) or 'none'}") from error
    return kind(**arguments)


def name_and_settings(predictor: nn.Module) -> tuple[str, dict]:
    """What `create_predictor` would make a module like this one from.

    Raises:
        UserError: its class is not registered, or it does not say what it was made with.
    """
    kind = type(predictor)
    name = next((name for name, other in PREDICTORS.items() if other is kind), None)
    if name is None:
        raise UserError(f"predictor of class {kind.__name__} is not registered: register_predictor makes it so")
    takes = set(inspect.signature(kind).parameters) - {"embed_dim", "grid_size"}
    if takes and not hasattr(predictor, "settings"):
        raise UserError(f"predictor {name!r} takes {', '.join(sorted(takes))}, but has no `settings` that tell them")
    return name, dict(getattr(predictor, "settings", {}))


def check_location(name: str, location: int) -> None:
    """Refuses a predictor that reads the class token alone where that token has not seen the image yet.

    Raises:
        UserError: such a predictor at location 1, or an unknown name.
    """
    if location == 1 and _reads_cls(_find(name)):
        others = ", ".join(sorted(other for other, kind in PREDICTORS.items() if not _reads_cls(kind)))
        raise UserError(
            f"predictor {name!r} ranks by the class token alone, which has seen no image before layer 1: "
            f"choose a first location from 2 on, or one of {others}"
        )


def _find(name: str) -> type[nn.Module]:
    if name not in PREDICTORS:
        raise UserError(f"predictor {name!r} is not registered; {near(name, PREDICTORS)}")
    return PREDICTORS[name]


def _reads_cls(kind: type[nn.Module]) -> bool:
    return getattr(kind, "reads_cls", False)


def narrowing(embed_dim: int, dim: int) -> nn.Module:
    """What brings tokens of width `embed_dim` to `dim` channels; nothing where they are as narrow already."""
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


def check_head(name: str, head: str) -> None:
    """Raises `UserError` for a head that predictor `name` cannot have because there is none of that name."""
    if head not in HEADS:
        raise UserError(f"head of {name} must be 'linear' or 'mean', but is {head!r}; {near(head, HEADS)}")


def create_head(name: str, head: str, dim: int) -> nn.Module:
    """`linear` weighs the channels, `mean` averages them as the paper does; `name` is whose head it is."""
    check_head(name, head)
    return Head(dim) if head == "linear" else Mean()


def linear_macs(module: nn.Module, rows: int) -> int:
    """MACs of all linear layers in `module` where each of them runs over `rows` rows."""
    return sum(rows * layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
