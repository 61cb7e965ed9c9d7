"""What hangs on the modules behind a pruned model's layers, so that patches that left are no part of an embedding.

On the full grid a patch that left is a row of zeros. A norm would make its bias of it, and pooling would count it.
These hooks hang on the model until it is unpruned; while nothing leaves they do nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from patchrank.layers.pooling import live_rows


class NormedRows:
    """A forward hook of the last norm: rows that were zeros stay zeros, or become the mean of the others.

    They become the mean where the host averages all patches, so that its mean is that of the patches that are there.

    Args:
        tower: ours, which knows whether anything leaves and what the host averages.
    """

    def __init__(self, tower: nn.Module):
        self.tower = tower

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        (x,) = args
        if self.tower.pruner is None or x.ndim != 3:  # of a class token alone
            return None
        live = live_rows(x).unsqueeze(-1).to(output.dtype)
        rest, first = output.new_zeros(()), self.tower.first_averaged()
        if first is not None:
            counted = live[:, first:]
            total = (output[:, first:] * counted).sum(1, keepdim=True)
            rest = total / counted.sum(1, keepdim=True).clamp(min=1)
        return torch.where(live > 0, output, rest)


class PooledRows:
    """A pre-hook of attention pooling: rows of zeros are not attended to.

    Args:
        tower: ours, which knows whether anything leaves.
        name: of the keyword argument that takes a mask.
        of: place of the tokens (B, L, D) among the arguments.
        inverted: whether the mask is True for what is left out (`key_padding_mask` of torch), or is added to logits.
    """

    def __init__(self, tower: nn.Module, name: str, of: int, inverted: bool):
        self.tower, self.name, self.of, self.inverted = tower, name, of, inverted

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.tower.pruner is None or kwargs.get(self.name) is not None:  # the tower shares it, and knows the sizes
            return None
        live = live_rows(args[self.of])
        mask = live == 0 if self.inverted else live.log()[:, None, None]
        return args, kwargs | {self.name: mask}


def hang(tower: nn.Module, norm: nn.Module, pool: nn.Module | None, pooled: PooledRows) -> list[RemovableHandle]:
    """Hangs the hooks that a host needs on its last norm and on what pools by attention, if anything does."""
    handles = [norm.register_forward_hook(NormedRows(tower))]
    if pool is not None:
        handles.append(pool.register_forward_pre_hook(pooled, with_kwargs=True))
    return handles
