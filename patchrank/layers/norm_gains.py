"""Learned gains of a tower's LayerNorms, beside its own weights, of which nothing changes.

A pruned sequence has other statistics than a whole one. Gains let the frozen layers answer to that, at no cost. They
are handed over with each call and nothing stays on the norms, so one tower may run with and without them in several
threads.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.layers.module_hooks import are_untouched, listening
from patchrank.utils.errors import UserError


def layer_norms(tower: nn.Module) -> list[nn.LayerNorm]:
    """The LayerNorms that a tower has, in this order: `norm_pre`, the two of every layer, `norm` behind the last."""
    found = [tower.norm_pre, *(norm for block in tower.blocks for norm in (block.norm1, block.norm2)), tower.norm]
    return [norm for norm in found if isinstance(norm, nn.LayerNorm)]


def check_gains(tower: nn.Module, gains: Tensor) -> None:
    """Raises `UserError` for gains that are not (norms, D), one for each of `layer_norms(tower)`."""
    norms = layer_norms(tower)
    if tuple(gains.shape) != (len(norms), tower.embed_dim):
        raise UserError(
            f"norm gains must have shape ({len(norms)}, {tower.embed_dim}) for this image tower, but have "
            f"{tuple(gains.shape)}"
        )


def scaled_norm(norm: nn.Module, x: Tensor, gains: Tensor | None, place: int) -> Tensor:
    """What a LayerNorm w x + b gives; (1 + g) w x + b with the gain g = `gains[place]`, which gradients reach."""
    output = norm(x)
    return output if gains is None else _scaled(norm, gains[place], output)


def _scaled(norm: nn.Module, gain: Tensor, output: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return output
    if not isinstance(norm, nn.LayerNorm):
        raise UserError(
            f"norm gains belong to LayerNorms, but one was replaced by {type(norm).__name__}: try set_prompts(None)"
        )
    centred = output if norm.bias is None else output - norm.bias
    return output + gain.to(output) * centred


class GainedBlock:
    """A transformer block of timm's as it runs with gains of its two norms; the block itself does not change.

    All parts of the block are there under their own names, for `patchrank.layers.class_token`.

    Args:
        block: any block of timm's with `norm1` and `norm2`.
        gains: (2, D), of these two.
    """

    def __init__(self, block: nn.Module, gains: Tensor):
        self.block = block
        self.gains = gains

    def __getattr__(self, name: str):
        return getattr(self.block, name)

    def norm1(self, x: Tensor) -> Tensor:
        return scaled_norm(self.block.norm1, x, self.gains, 0)

    def norm2(self, x: Tensor) -> Tensor:
        return scaled_norm(self.block.norm2, x, self.gains, 1)

    def __call__(self, x: Tensor, **kwargs) -> Tensor:
        block = self.block
        if are_untouched([block]):
            return type(block).forward(self, x, **kwargs)  # timm's own code, which finds the norms of this object
        norms = zip((block.norm1, block.norm2), self.gains)
        with listening([(norm, partial(_scaled, norm, gain)) for norm, gain in norms]):
            return block(x, **kwargs)


def plain_norm(block: nn.Module | GainedBlock, which: int, x: Tensor) -> Tensor:
    """What `norm1` or `norm2` of a block makes of tokens (B, K, D), in float32 and without a call of the module.

    So hooks on the norm fire once, when the block itself runs.

    Args:
        which: 1 or 2.
    """
    norm = getattr(block.block if isinstance(block, GainedBlock) else block, f"norm{which}")
    if not isinstance(norm, nn.LayerNorm):
        return norm(x).float()
    weight, bias = (None if part is None else part.float() for part in (norm.weight, norm.bias))
    output = F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)
    return _scaled(norm, block.gains[which - 1], output) if isinstance(block, GainedBlock) else output


def gained_blocks(tower: nn.Module, gains: Tensor) -> list[GainedBlock]:
    """The layers of a tower with their rows of `gains`, which are in the order of `layer_norms`."""
    first = int(isinstance(tower.norm_pre, nn.LayerNorm))
    places = range(first, first + 2 * len(tower.blocks), 2)
    return [GainedBlock(block, gains[place : place + 2]) for block, place in zip(tower.blocks, places)]
