"""A predictor in which patches see one another by attention."""

from __future__ import annotations

import math

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchrank.layers.macs import block_macs
from patchrank.layers.predictors.base import USUAL, create_head, linear_macs, narrowing, register_predictor

MIN_HEAD_DIM = 16


@register_predictor("transformer")
class Transformer(nn.Module):
    """One encoder block over the patches, then one score per token.

    `dim` narrows the channels first; `head="linear"` weighs the channels, `head="mean"` averages them.
    """

    def __init__(self, embed_dim: int, grid_size: tuple[int, int], dim: int = USUAL.dim, head: str = USUAL.head):
        super().__init__()
        self.settings = {"dim": dim, "head": head}
        self.num_tokens = math.prod(grid_size)
        self.narrow = narrowing(embed_dim, dim)
        self.block = Block(dim, num_heads(dim), mlp_ratio=4.0, qkv_bias=True)
        self.head = create_head("transformer", head, dim)

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Scores (B, N), high = keep, of patches (B, N, D); the class token (B, D) is not used."""
        return self.head(self.block(self.narrow(patches)))

    def num_macs(self) -> int:
        """Multiply-accumulates of one image's scores, linear layers and attention."""
        fc1 = self.block.mlp.fc1
        per_token = linear_macs(self.narrow, self.num_tokens) + linear_macs(self.head, self.num_tokens)
        return per_token + block_macs(self.num_tokens, fc1.in_features, fc1.out_features)


def num_heads(dim: int) -> int:
    """The largest of 12, 8, 4, 2 that divides `dim` and leaves each head at least 16 channels, else 1."""
    return next((n for n in (12, 8, 4, 2) if dim % n == 0 and dim // n >= MIN_HEAD_DIM), 1)
