"""A predictor that sees the class token alone."""

from __future__ import annotations

import math

from torch import Tensor, nn

from patchrank.layers.predictors.base import USUAL, linear_macs, narrowing, register_predictor
from patchrank.utils.errors import UserError

HIDDEN = 256


@register_predictor("mlp")
class Mlp(nn.Module):
    """All scores at once from the class token: [narrow] -> Linear to 256 -> LayerNorm -> GELU -> Linear to N.

    `dim` narrows the class token first. There is one head, "linear".
    """

    reads_cls = True  # `check_location` refuses it where the class token has seen no image yet

    def __init__(self, embed_dim: int, grid_size: tuple[int, int], dim: int = USUAL.dim, head: str = USUAL.head):
        super().__init__()
        self.settings = {"dim": dim, "head": head}
        if head != "linear":
            rule = "it gives one number per token, no channels to average"
            raise UserError(f"head of mlp must be 'linear', but is {head!r}: {rule}")
        hidden = (nn.Linear(dim, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU())
        self.layers = nn.Sequential(narrowing(embed_dim, dim), *hidden, nn.Linear(HIDDEN, math.prod(grid_size)))

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Scores (B, N), high = keep, from the class token (B, D); the patches (B, N, D) are not used."""
        return self.layers(cls)

    def num_macs(self) -> int:
        """Multiply-accumulates of one image's scores, linear layers alone."""
        return linear_macs(self, 1)
