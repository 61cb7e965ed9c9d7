"""Predictors of the golden ranking (section 3.2): class token and patch tokens in, one score per patch out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from patchrank.errors import UserError, near
from patchrank.files import read_bytes, write_atomic

ABOUT = ("name", "kwargs", "grid", "embed_dim", "location", "metric", "model")  # what a predictor's file says of it
PREDICTORS: dict[str, type[nn.Module]] = {}


def register_predictor(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Makes a module class available to `create_predictor`, and so to YAML, under `name`."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        PREDICTORS[name] = cls
        return cls

    return register


def create_predictor(name: str, embed_dim: int, grid_size: tuple[int, int], **kwargs) -> nn.Module:
    """Builds a registered predictor for patch tokens of width `embed_dim` on a grid of `grid_size`."""
    if name not in PREDICTORS:
        raise UserError(f"predictor {name!r} is not registered; {near(name, PREDICTORS)}")
    return PREDICTORS[name](embed_dim=embed_dim, grid_size=tuple(grid_size), **kwargs)


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
        predictor = create_predictor(about["name"], about["embed_dim"], tuple(about["grid"]), **about["kwargs"])
        predictor.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"predictor file {path}: weights and metadata do not fit together ({reason})") from error
    return predictor.eval(), about


def _metadata(content: bytes) -> dict:
    """What the header of a safetensors file says under our key: 8 bytes of length, then JSON."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header.get("__metadata__", {}).get("patchrank", "{}"))


class _Mix(nn.Sequential):
    """Fully connected layer without expansion, layer norm and GELU over the last axis, with a residual (eq. 5, 6)."""

    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@register_predictor("mix_mlp")
class MixMlp(nn.Module):
    """The paper's Mix-MLP: channel mixing, then token mixing, then one score per token (eq. 5 to 7).

    Modifications: `dim` narrows the channels first by a linear layer, and `head="linear"` weighs the channels where
    `head="mean"` averages them as the paper does. Token mixing ties it to its grid.
    """

    def __init__(self, embed_dim: int, grid_size: tuple[int, int], dim: int = 64, head: str = "linear"):
        super().__init__()
        if head not in ("linear", "mean"):
            raise UserError(f"head of mix_mlp must be 'linear' or 'mean', but is {head!r}")
        self.embed_dim, self.grid_size, self.dim = embed_dim, grid_size, dim
        num_tokens = grid_size[0] * grid_size[1]
        self.narrow = nn.Linear(embed_dim, dim) if dim != embed_dim else nn.Identity()
        self.channel_mixing = _Mix(dim)
        self.token_mixing = _Mix(num_tokens)
        self.head = nn.Linear(dim, 1) if head == "linear" else None

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Scores (B, N), high = keep, of patches (B, N, D); the class token (B, D) is not used."""
        num_tokens = self.grid_size[0] * self.grid_size[1]
        torch._assert(patches.shape[1] == num_tokens, f"mix_mlp is tied to a grid of {self.grid_size}")
        x = self.channel_mixing(self.narrow(patches))
        x = self.token_mixing(x.transpose(1, 2)).transpose(1, 2)
        return x.mean(-1) if self.head is None else self.head(x).squeeze(-1)

    def num_macs(self) -> int:
        """Multiply-accumulates of one image's scores, linear layers alone."""
        num_tokens, dim = self.grid_size[0] * self.grid_size[1], self.dim
        narrow = 0 if isinstance(self.narrow, nn.Identity) else num_tokens * self.embed_dim * dim
        head = 0 if self.head is None else num_tokens * dim
        return narrow + num_tokens * dim * dim + dim * num_tokens * num_tokens + head
