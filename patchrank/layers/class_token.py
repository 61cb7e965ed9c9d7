"""What is computed for the class token alone: its row of attention, and the last block's output.

With the queries q and keys k of a layer, a_j = mean over heads of softmax_j(q_cls . k_j / sqrt(d)), over all tokens of
the sequence; the full matrix is never made, beside fused attention. Once pooling takes the class token, nothing reads
the other rows of the last block, which is 6.9 % of CLIP B/16's image tower; leaving them out is exact up to rounding
(1e-6).

Both take a block apart. Where that would pass by something that hangs on it, or by a layer of another kind, the block
runs as a module, and hooks fire once, as they would without pruning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.fx import Proxy

from patchrank.layers.macs import block_macs, hidden_size
from patchrank.layers.module_hooks import are_untouched, is_own_forward, listening
from patchrank.layers.norm_gains import GainedBlock
from patchrank.utils.errors import UserError
from patchrank.utils.private_names import has_global_hooks, has_hooks

_UNREAD = (
    "class attention cannot be read in a block whose attention was compiled by itself or got another `forward`: choose "
    "another reducer"
)


def check_attention(blocks: nn.Sequential, layer: int) -> None:
    """Raises `UserError` if this file does not define class attention for the block of a layer, from 1."""
    attn = getattr(blocks[layer - 1], "attn", None)
    if not isinstance(attn, Attention) or type(attn).forward is not Attention.forward:
        raise UserError(
            f"class attention needs timm's own `Attention`, but layer {layer} has {type(attn).__name__}: choose "
            "another reducer"
        )


def is_plain(block: nn.Module) -> bool:
    """Whether `forward_cls` gives what a block would: it is timm's own, without gates or q/k norms.

    Nothing hangs on it or on any part of it (hooks, another `forward`), and no part is replaced (LoRA, quantised).
    """
    if not _has_plain_parts(block) or not are_untouched(block.modules()):
        return False
    attn = block.attn
    if not (type(attn.qkv) is type(attn.proj) is nn.Linear and is_own_forward(nn.Linear)):
        return False
    bare = all(type(norm) is nn.Identity for norm in (attn.q_norm, attn.k_norm, attn.norm))
    # a weight that is made of other tensors (quantised or spread over machines) is not cut into queries and keys
    return bare and not hasattr(attn.qkv.weight, "__tensor_flatten__")


def _has_plain_parts(block: nn.Module) -> bool:
    """Whether calling the parts of a block is the same as calling it; each part may be anything."""
    attn = getattr(block, "attn", None)
    if type(block) is not Block or type(attn) is not Attention or attn.gate is not None:
        return False
    if type(attn.attn_drop) is not nn.Dropout or not (is_own_forward(Block) and is_own_forward(Attention)):
        return False
    return are_untouched((block, attn, attn.attn_drop))


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


def forward_with_row(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """`block(x)`, and its class token's attention, from the same queries and keys.

    Args:
        x: (B, L, D), class token first.

    Returns:
        (B, L, D) and the row (B, L), after softmax, mean over heads, in float32.

    Raises:
        UserError: queries and keys do not pass where they can be seen.
    """
    if isinstance(x, Proxy):  # torch.fx wants every block as a module, and runs no hooks while it traces
        row = cls_row(block, x)  # first, since a module's last step stands for its output in a graph
        return block(x), row
    if not _has_plain_parts(_bare(block)):
        return _listen(block, x)
    attn = block.attn
    q, k, v = _queries_keys_values(block, x)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    out = attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))
    x = x + block.drop_path1(block.ls1(out))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), _row(q[:, :, :1], k, attn.scale)


def cls_row(block: Block, x: Tensor) -> Tensor:
    """The row (B, L) that a block will give its class token, before the block has run on x (B, L, D).

    The block is called by itself later. So its own hooks are left for that call, unless they may change x.
    """
    attn, way = block.attn, _way_to_row(_bare(block))
    if way == "block":
        return _listen(block, x)[1]
    if way == "parts" or isinstance(x, Proxy):
        q, k, _ = _queries_keys_values(block, x)
        return _row(q[:, :, :1], k, attn.scale)
    normed = block.norm1(x)
    wq, wk, _ = attn.qkv.weight.chunk(3)
    bq, bk, _ = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    shape = (attn.num_heads, attn.head_dim)
    q = F.linear(normed[:, :1], wq, bq).unflatten(2, shape).transpose(1, 2)
    k = F.linear(normed, wk, bk).unflatten(2, shape).transpose(1, 2)
    return _row(q, k, attn.scale)


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


def _queries_keys_values(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What timm's attention makes of x (B, L, D), each (B, heads, L, d)."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _listen(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """`block(x)` by a call of the module, and the row from the queries and keys that pass by in it."""
    attn, queries, keys = block.attn, [], []
    with listening([(attn.q_norm, queries.append), (attn.k_norm, keys.append)]):
        out = block(x)
    if len(queries) != 1 or len(keys) != 1:
        raise UserError(_UNREAD)
    return out, _row(queries[0][:, :, :1], keys[0], attn.scale)


def _row(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    logits = (query * scale) @ keys.transpose(-2, -1)  # (B, heads, 1, L)
    return logits.softmax(dim=-1, dtype=torch.float32).mean(1).squeeze(1)


def _bare(block: Block | GainedBlock) -> nn.Module:
    return block.block if isinstance(block, GainedBlock) else block
