"""A block whose queries, keys and values were made beforehand, for many sequences that share their tokens.

Up to its attention a block looks at each token alone. So of a token that stands in many sequences, its norm, query, key
and value are made once, and gathered as the token is.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchrank.layers.class_token import is_plain


def can_share(block: nn.Module) -> bool:
    """Whether `run_from_qkv(block, x, qkv_of(block, x))` is what `block(x)` is, whichever tokens are gathered between.

    False where anything hangs on a block or replaces a part of it, since that may count calls or look at all tokens.
    """
    return is_plain(block) and isinstance(block.norm1, nn.LayerNorm)


def qkv_of(block: Block, x: Tensor) -> Tensor:
    """Queries, keys and values (B, L, 3 D) of tokens x (B, L, D), side by side."""
    return block.attn.qkv(block.norm1(x))


def run_from_qkv(block: Block, x: Tensor, qkv: Tensor) -> Tensor:
    """What a block gives for tokens x (B, L, D), of which `qkv` (B, L, 3 D) was made."""
    attn = block.attn
    q, k, v = qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
