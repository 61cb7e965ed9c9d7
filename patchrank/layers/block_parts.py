"""Blocks that run in two parts, attention and MLP, and the signals that reducers read in them.

A part that is called as a module fires its hooks, as it would without pruning. Sometimes calling the parts would skip
something: hooks on the block itself, or the code of a layer of another kind. Then the whole block is called as a
module, and forward hooks of ours read queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.fx import Proxy

from patchrank.layers.module_hooks import are_untouched, is_own_forward, listening
from patchrank.layers.norm_gains import GainedBlock
from patchrank.utils.errors import UserError

_UNREAD = (
    "class attention and keys cannot be read in a block whose attention was compiled by itself or got another "
    "`forward`: choose another reducer"
)


@dataclass(frozen=True)
class Seen:
    """The signals that were read in a layer; None for those that nobody asked for.

    cls_row: (B, L), the class token's attention, after softmax, mean over heads, in float32.
    keys: (B, L, d), mean over heads.
    shift: (B, L), by how much the MLP changed each token, as a Euclidean norm.
    """

    cls_row: Tensor | None = None
    keys: Tensor | None = None
    shift: Tensor | None = None


SIGNALS = ("cls_row", "keys", "shift")  # what a reducer may ask for of a layer
Middle = Callable[[Tensor, Seen], Tensor]  # what happens to a sequence (B, L, D) between attention and MLP


def bare(block: nn.Module | GainedBlock) -> nn.Module:
    """The block itself, where it runs with gains."""
    return block.block if isinstance(block, GainedBlock) else block


def check_attention(block: nn.Module | GainedBlock, layer: int) -> None:
    """Raises `UserError` if class attention and keys are not defined for a block, which is that of a layer, from 1."""
    attn = getattr(bare(block), "attn", None)
    if not isinstance(attn, Attention) or type(attn).forward is not Attention.forward:
        raise UserError(
            f"class attention and keys need timm's own `Attention`, but layer {layer} has {type(attn).__name__}: "
            "choose another reducer"
        )


def check_parts(block: nn.Module | GainedBlock, layer: int) -> None:
    """Raises `UserError` if a block, that of a layer from 1, cannot run in two parts: attention, then MLP."""
    block = bare(block)
    if type(block) is not Block or not is_own_forward(Block):
        raise UserError(
            f"this reducer acts inside a layer, which needs timm's own `Block`, but layer {layer} has "
            f"{type(block).__name__}: choose another reducer"
        )
    if not are_untouched((block,)):
        raise UserError(
            f"this reducer acts inside a layer, so hooks on the block of layer {layer} as a whole would be lost: try "
            "to hang them on the block's parts (attn, mlp), or choose another reducer"
        )


def has_plain_parts(block: nn.Module) -> bool:
    """Whether calling the parts of a block is the same as calling it; each part may be anything."""
    attn = getattr(block, "attn", None)
    if type(block) is not Block or type(attn) is not Attention or attn.gate is not None:
        return False
    if type(attn.attn_drop) is not nn.Dropout or not (is_own_forward(Block) and is_own_forward(Attention)):
        return False
    return are_untouched((block, attn, attn.attn_drop))


def queries_keys_values(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What timm's attention makes of x (B, L, D), each (B, heads, L, d)."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def row_of(query: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """A row of attention (B, L): after softmax, mean over heads, in float32.

    Args:
        query, keys: (B, heads, 1, d) and (B, heads, L, d).
        bias: (B, 1, 1, L), added to the logits.
    """
    logits = (query * scale) @ keys.transpose(-2, -1)  # (B, heads, 1, L)
    logits = logits if bias is None else logits + bias
    return logits.softmax(dim=-1, dtype=torch.float32).mean(1).squeeze(1)


def run_block(
    block: Block, x: Tensor, bias: Tensor | None = None, wanted: Collection[str] = (), middle: Middle | None = None
) -> tuple[Tensor, Seen]:
    """A block's output for x (B, L, D), class token first, and the signals that were read in it.

    Args:
        bias: (B, 1, 1, L), added to the logits of attention.
        wanted: which of `SIGNALS`.
        middle: changes the sequence between attention and MLP, and may shorten it. It is given class row and keys.

    Raises:
        UserError: class row or keys are wanted of an attention that hides them (compiled, or with another `forward`).
    """
    in_parts = middle is not None or "shift" in wanted
    if not wanted and not in_parts:
        return _call(block, x, bias), Seen()
    if in_parts or (has_plain_parts(bare(block)) and not isinstance(x, Proxy)):
        return _run_parts(block, x, bias, wanted, middle)
    output, q, k = _attended(block, block, x, x, bias, wanted)
    return output, _seen(block, q, k, bias, wanted)


def listen(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, each (B, heads, L, d), that pass by in a call of a block on x (B, L, D)."""
    return _listen(block, lambda: block(x))[1:]


def _run_parts(
    block: Block, x: Tensor, bias: Tensor | None, wanted: Collection[str], middle: Middle | None
) -> tuple[Tensor, Seen]:
    attn = block.attn
    if has_plain_parts(bare(block)) and not isinstance(x, Proxy):  # torch.fx wants to see attention as a module
        q, k, v = queries_keys_values(block, x)
        dropout = attn.attn_drop.p if attn.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        attended = attn.proj_drop(attn.proj(attn.norm(attended.transpose(1, 2).flatten(2))))
    else:
        attended, q, k = _attended(block, attn, x, block.norm1(x), bias, wanted)
    x = x + block.drop_path1(block.ls1(attended))
    seen = _seen(block, q, k, bias, wanted)
    x = x if middle is None else middle(x, seen)
    change = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    shift = change.float().norm(dim=-1) if "shift" in wanted else None
    return x + change, Seen(seen.cls_row, seen.keys, shift)


def _attended(
    block: Block, module: nn.Module, x: Tensor, given: Tensor, bias: Tensor | None, wanted: Collection[str]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a block or its attention, the `module`, gives, with queries and keys where these are wanted.

    Args:
        x: (B, L, D), what enters the block.
        given: (B, L, D), what enters the module.
    """
    if not {"cls_row", "keys"} & set(wanted):
        return _call(module, given, bias), None, None
    if isinstance(x, Proxy):  # torch.fx calls no hooks, so they are computed apart; the block's own output comes last
        q, k, _ = queries_keys_values(block, x)
        return _call(module, given, bias), q, k
    return _listen(block, lambda: _call(module, given, bias))


def _call(module: Callable, x: Tensor, bias: Tensor | None) -> Tensor:
    return module(x) if bias is None else module(x, attn_mask=bias)


def _seen(block: Block, q: Tensor | None, k: Tensor | None, bias: Tensor | None, wanted: Collection[str]) -> Seen:
    row = row_of(q[:, :, :1], k, block.attn.scale, bias) if "cls_row" in wanted else None
    return Seen(row, k.mean(1) if "keys" in wanted else None)


def _listen(block: Block, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a call of a block or of its attention gives, and the queries and keys that pass by in it."""
    attn, queries, keys = block.attn, [], []
    with listening([(attn.q_norm, queries.append), (attn.k_norm, keys.append)]):
        out = call()
    if len(queries) != 1 or len(keys) != 1:
        raise UserError(_UNREAD)
    return out, queries[0], keys[0]
