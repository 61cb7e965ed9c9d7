"""The last block for the class token alone: nothing reads the other rows once pooling takes the class token.

Exact up to rounding (1e-6), and 6.9 % of CLIP B/16's image tower.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's own, without gates, q/k norms or replaced (LoRA, quantised) linear layers."""
    attn = getattr(block, "attn", None)
    if type(block) is not Block or type(attn) is not Attention:
        return False
    bare = all(isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm, attn.norm))
    return bare and attn.gate is None and type(attn.qkv) is type(attn.proj) is nn.Linear


def forward_cls(block: Block, x: Tensor) -> Tensor:
    """What `block(x)[:, :1]` would return for a plain block: x (B, L, D) to (B, 1, D)."""
    normed = block.norm1(x)
    cls = x[:, :1]
    cls = cls + block.drop_path1(block.ls1(_attend(block.attn, normed[:, :1], normed)))
    return cls + block.drop_path2(block.ls2(block.mlp(block.norm2(cls))))


def _attend(attn: Attention, query: Tensor, keys: Tensor) -> Tensor:
    batch, length, _ = keys.shape
    wq, wkv = attn.qkv.weight.split([attn.attn_dim, 2 * attn.attn_dim])
    bq, bkv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split([attn.attn_dim, 2 * attn.attn_dim])
    q = F.linear(query, wq, bq).view(batch, 1, attn.num_heads, attn.head_dim).transpose(1, 2)
    kv = F.linear(keys, wkv, bkv).view(batch, length, 2, attn.num_heads, attn.head_dim)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    return attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(batch, 1, attn.attn_dim)))
