"""The class token's row of attention, beside fused attention: the full matrix is never made.

For plain blocks a_j = mean over heads of softmax_j(q_cls . k_j / sqrt(d)), over all tokens of the sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchrank.layers.last_block import is_plain
from patchrank.utils.errors import UserError


def plain_block(blocks: nn.Sequential, layer: int) -> Block:
    """The block of a layer, from 1. Raises `UserError` where it is none whose class attention is defined here."""
    if not is_plain(blocks[layer - 1]):
        raise UserError(
            f"class attention needs plain attention modules, but layer {layer} has gates, q/k norms or replaced "
            "linear layers (LoRA, quantised): choose another reducer"
        )
    return blocks[layer - 1]


def forward_with_row(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """`block(x)` for a plain block, and its class token's attention, from the same queries and keys.

    Args:
        x: (B, L, D), class token first.

    Returns:
        (B, L, D) and the row (B, L), after softmax, mean over heads, in float32.
    """
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    out = attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))
    x = x + block.drop_path1(block.ls1(out))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), _row(q[:, :, :1], k, attn.scale)


def cls_row(block: Block, x: Tensor) -> Tensor:
    """The row (B, L) that a plain block will give its class token, before the block has run on x (B, L, D)."""
    attn, normed = block.attn, block.norm1(x)
    wq, wk, _ = attn.qkv.weight.chunk(3)
    bq, bk, _ = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    shape = (attn.num_heads, attn.head_dim)
    q = F.linear(normed[:, :1], wq, bq).unflatten(2, shape).transpose(1, 2)
    k = F.linear(normed, wk, bk).unflatten(2, shape).transpose(1, 2)
    return _row(q, k, attn.scale)


def _row(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    logits = (query * scale) @ keys.transpose(-2, -1)  # (B, heads, 1, L)
    return logits.softmax(dim=-1, dtype=torch.float32).mean(1).squeeze(1)
