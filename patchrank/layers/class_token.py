"""What is computed for the class token alone: its row of attention, and the last block's output.

With the queries q and keys k of a layer, a_j = mean over heads of softmax_j(q_cls . k_j / sqrt(d)), over all tokens of
the sequence; the full matrix is never made, beside fused attention. Once pooling takes the class token, nothing reads
the other rows of the last block, which is 6.9 % of CLIP B/16's image tower; leaving them out is exact up to rounding
(1e-6).
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.fx import Proxy

from patchrank.layers.block_parts import bare, has_plain_parts, listen, queries_keys_values, row_of
from patchrank.layers.macs import block_macs, hidden_size
from patchrank.layers.module_hooks import are_untouched, is_own_forward
from patchrank.utils.private_names import has_global_hooks, has_hooks


def is_plain(block: nn.Module) -> bool:
    """Whether `forward_cls` gives what a block would: it is timm's own, without gates or q/k norms.

    Nothing hangs on it or on any part of it (hooks, another `forward`), and no part is replaced (LoRA, quantised).
    """
    if not has_plain_parts(block) or not are_untouched(block.modules()):
        return False
    attn = block.attn
    if not (type(attn.qkv) is type(attn.proj) is nn.Linear and is_own_forward(nn.Linear)):
        return False
    without_norms = all(type(norm) is nn.Identity for norm in (attn.q_norm, attn.k_norm, attn.norm))
    # a weight that is made of other tensors (quantised or spread over machines) is not cut into queries and keys
    return without_norms and not hasattr(attn.qkv.weight, "__tensor_flatten__")


def can_skip_rows(tower: nn.Module) -> bool:
    """Whether nothing reads the last block's patches, and `forward_cls` gives what that block would."""
    return tower.global_pool == "token" and is_plain(tower.blocks[-1])


def forward_cls(block: Block, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `block(x, attn_mask=bias)[:, :1]` would return for a plain block: x (B, L, D) to (B, 1, D).

    Args:
        bias: (B, 1, 1, L), added to the logits of attention.
    """
    attn, normed, cls = block.attn, block.norm1(x), x[:, :1]
    batch, length, _ = x.shape
    sizes = [attn.attn_dim, 2 * attn.attn_dim]
    wq, wkv = attn.qkv.weight.split(sizes)
    bq, bkv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(sizes)
    q = F.linear(normed[:, :1], wq, bq).view(batch, 1, attn.num_heads, attn.head_dim).transpose(1, 2)
    kv = F.linear(normed, wkv, bkv).view(batch, length, 2, attn.num_heads, attn.head_dim)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    out = attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(batch, 1, attn.attn_dim)))
    cls = cls + block.drop_path1(block.ls1(out))
    return cls + block.drop_path2(block.ls2(block.mlp(block.norm2(cls))))


def cls_row(block: Block, x: Tensor) -> Tensor:
    """The row (B, L) that a block will give its class token, before the block has run on x (B, L, D)."""
    q, k = queries_keys(block, x)
    return row_of(q[:, :, :1], k, block.attn.scale)


def queries_keys(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, each (B, heads, L, d), that a block will make of x (B, L, D), before it has run.

    Queries may be of the class token alone, (B, heads, 1, d). The block itself runs later, so its hooks do not fire
    here, unless they may change what enters it.
    """
    attn, way = block.attn, _way_to_row(bare(block))
    if way == "block":
        return listen(block, x)
    if way == "parts" or isinstance(x, Proxy):
        return queries_keys_values(block, x)[:2]
    normed = block.norm1(x)
    wq, wk, _ = attn.qkv.weight.chunk(3)
    bq, bk, _ = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    shape = (attn.num_heads, attn.head_dim)
    q = F.linear(normed[:, :1], wq, bq).unflatten(2, shape).transpose(1, 2)
    return q, F.linear(normed, wk, bk).unflatten(2, shape).transpose(1, 2)


def cls_row_macs(block: Block, num_tokens: int) -> int:
    """MACs of `cls_row`, without the product of query and keys."""
    attn, way = block.attn, _way_to_row(block)
    dim = attn.attn_dim
    if way == "block":
        return block_macs(num_tokens, dim, hidden_size(block))
    return (3 * num_tokens if way == "parts" else 1 + num_tokens) * dim * dim


def _way_to_row(block: nn.Module) -> str:
    """What `cls_row` runs: "weights" for two of the three projections, "parts" for all three, or the whole "block"."""
    if is_plain(block):
        return "weights"
    own = type(block) is Block and is_own_forward(Block) and is_own_forward(Attention)
    changed = has_global_hooks(before=True) or any(
        has_hooks(module, before=True) or "forward" in vars(module) for module in (block, block.attn)
    )
    return "parts" if own and not changed else "block"
