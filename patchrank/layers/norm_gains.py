"""Learned gains of a tower's LayerNorms, beside its own weights, of which nothing changes.

A pruned sequence has other statistics than a whole one; gains let the frozen layers answer to that, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from patchrank.utils.errors import UserError


def layer_norms(tower: nn.Module) -> list[nn.LayerNorm]:
    """`norm_pre`, the two of every layer and the last one, in this order; those that the tower has."""
    found = [tower.norm_pre, *(norm for block in tower.blocks for norm in (block.norm1, block.norm2)), tower.norm]
    return [norm for norm in found if isinstance(norm, nn.LayerNorm)]


Hooked = tuple[nn.LayerNorm, Callable]


def gain_hooks(tower: nn.Module, gains: Tensor) -> list[Hooked]:
    """What lets every LayerNorm w x + b give (1 + g) w x + b, once it is hooked on by `hook`.

    Args:
        gains: g, (norms, D), in the order of `layer_norms`; gradients reach them.

    Raises:
        UserError: gains of another shape.
    """
    norms = layer_norms(tower)
    if tuple(gains.shape) != (len(norms), tower.embed_dim):
        raise UserError(
            f"norm gains must have shape ({len(norms)}, {tower.embed_dim}) for this image tower, but have "
            f"{tuple(gains.shape)}"
        )
    return [(norm, partial(_scale, gains, place)) for place, norm in enumerate(norms)]


def hook(hooks: Sequence[Hooked]) -> tuple[RemovableHandle, ...]:
    """Hooks them on; removing the handles undoes it."""
    return tuple(norm.register_forward_hook(function) for norm, function in hooks)


def _scale(gains: Tensor, place: int, norm: nn.LayerNorm, inputs: tuple, output: Tensor) -> Tensor:
    centred = output if norm.bias is None else output - norm.bias
    return output + gains[place].to(output) * centred
