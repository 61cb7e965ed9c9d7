"""The registry of prompt layers, and how their tokens stand in a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchrank.layers.registry import Registry
from patchrank.utils.errors import UserError

PROMPTS = Registry("prompt", always=("mode", "num_tokens", "text_dim", "image_dim"))
register_prompt = PROMPTS.register  # a decorator: makes a class that derives from `Prompts` available to YAML by name


def create_prompt(
    name: str, mode: str, num_tokens: int, text_dim: int, image_dim: int | None = None, **settings
) -> nn.Module:
    """Builds a registered prompt layer; the arguments are those of `Prompts`.

    Raises:
        UserError: an unknown name, a setting that this layer does not have, or a value that it cannot have.
    """
    return PROMPTS.create(name, mode=mode, num_tokens=num_tokens, text_dim=text_dim, image_dim=image_dim, **settings)


def insert(x: Tensor, tokens: Tensor, place: int) -> Tensor:
    """Puts tokens (n, D) into sequences (B, L, D), so that they begin at `place`: (B, L + n, D)."""
    tokens = tokens.to(x).expand(len(x), -1, -1)
    return torch.cat([x[:, :place], tokens, x[:, place:]], dim=1)


def remove(x: Tensor, place: int, count: int) -> Tensor:
    """Takes `count` tokens out of sequences (B, L, D), from `place` on."""
    return torch.cat([x[:, :place], x[:, place + count :]], dim=1) if count else x


def count_visual(prompts: nn.Module, embed_dim: int) -> int:
    """How many visual tokens there are. Raises `UserError` if they do not fit a tower of width `embed_dim`."""
    with torch.no_grad():
        shape = tuple(prompts.visual().shape)
    if len(shape) != 2 or shape[1] != embed_dim:
        raise UserError(f"visual prompts must have shape (b, {embed_dim}) for this image tower, but have {shape}")
    return shape[0]
