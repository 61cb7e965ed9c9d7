"""The paper's predictor: channels are mixed, then tokens (section 3.2)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from patchrank.layers.predictors.base import USUAL, create_head, linear_macs, narrowing, register_predictor
from patchrank.utils.private_names import traceable_assert


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

    def __init__(self, embed_dim: int, grid_size: tuple[int, int], dim: int = USUAL.dim, head: str = USUAL.head):
        super().__init__()
        self.settings = {"dim": dim, "head": head}
        self.grid_size, self.dim = grid_size, dim
        self.narrow = narrowing(embed_dim, dim)
        self.channel_mixing = _Mix(dim)
        self.token_mixing = _Mix(math.prod(grid_size))
        self.head = create_head("mix_mlp", head, dim)

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Scores (B, N), high = keep, of patches (B, N, D); the class token (B, D) is not used."""
        fits = patches.shape[1] == math.prod(self.grid_size)
        traceable_assert(fits, f"mix_mlp is tied to a grid of {self.grid_size}")
        x = self.channel_mixing(self.narrow(patches))
        x = self.token_mixing(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)

    def num_macs(self) -> int:
        """Multiply-accumulates of one image's scores, linear layers alone."""
        per_token = (self.narrow, self.channel_mixing, self.head)
        over_tokens = sum(linear_macs(part, math.prod(self.grid_size)) for part in per_token)
        return over_tokens + linear_macs(self.token_mixing, self.dim)
