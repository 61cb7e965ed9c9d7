"""What is computed for the class token alone: its row of attention, and the last block's output.

For plain blocks a_j = mean over heads of softmax_j(q_cls . k_j / sqrt(d)), over all tokens of the sequence; the full
matrix is never made, beside fused attention. Once pooling takes the class token, nothing reads the other rows of the
last block, which is 6.9 % of CLIP B/16's image tower; leaving them out is exact up to rounding (1e-6).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchrank.utils.errors import UserError


def check_plain(blocks: nn.Sequential, layer: int) -> None:
    """Raises `UserError` if this file does not define class attention for the block of a layer, from 1."""
    if not is_plain(blocks[layer - 1]):
        raise UserError(
            f"class attention needs plain attention modules, but layer {layer} has gates, q/k norms or replaced "
            "linear layers (LoRA, quantised): choose another reducer"
        )


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


def is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's own, without gates, q/k norms or replaced (LoRA, quantised) linear layers."""
    attn = getattr(block, "attn", None)
    if type(block) is not Block or type(attn) is not Attention:
        return False
    bare = all(isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm, attn.norm))
    return bare and attn.gate is None and type(attn.qkv) is type(attn.proj) is nn.Linear


def forward_cls(block: Block, x: Tensor) -> Tensor:
    """What `block(x)[:, :1]` would return for a plain block: x (B, L, D) to (B, 1, D)."""
    attn, normed, cls = block.attn, block.norm1(x), x[:, :1]
    batch, length, _ = x.shape
    sizes = [attn.attn_dim, 2 * attn.attn_dim]
    wq, wkv = attn.qkv.weight.split(sizes)
    bq, bkv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(sizes)
    q = F.linear(normed[:, :1], wq, bq).view(batch, 1, attn.num_heads, attn.head_dim).transpose(1, 2)
    kv = F.linear(normed, wkv, bkv).view(batch, length, 2, attn.num_heads, attn.head_dim)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    out = attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(batch, 1, attn.attn_dim)))
    cls = cls + block.drop_path1(block.ls1(out))
    return cls + block.drop_path2(block.ls2(block.mlp(block.norm2(cls))))
