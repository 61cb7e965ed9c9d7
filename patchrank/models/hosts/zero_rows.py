"""What hangs on the modules behind a pruned model's layers, so that patches that left are no part of an embedding.

On the full grid a patch that left is a row of zeros. A norm would make its bias of it, and pooling would count it.
These hooks hang on the model for as long as it is pruned; where no row is zeros they change nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from patchrank.layers.pooling import live_rows

Left = Literal["zeros", "mean"]


class NormedRows:
    """A forward hook of the last norm: rows that were zeros stay zeros, or become the mean of the others.

    Args:
        left: "mean" where the host averages all patches, so that its mean is that of the patches that are there.
        first: place of the first patch.
    """

    def __init__(self, left: Left, first: int):
        self.left, self.first = left, first

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        (x,) = args
        if x.ndim != 3:  # of a class token alone
            return None
        live = live_rows(x).unsqueeze(-1).to(output.dtype)
        rest = output.new_zeros(())
        if self.left == "mean":
            counted = live[:, self.first :]
            total = (output[:, self.first :] * counted).sum(1, keepdim=True)
            rest = total / counted.sum(1, keepdim=True).clamp(min=1)
        return torch.where(live > 0, output, rest)


class PooledRows:
    """A pre-hook of attention pooling: rows of zeros are not attended to.

    Args:
        name: of the keyword argument that takes a mask.
        of: place of the tokens (B, L, D) among the arguments.
        inverted: whether the mask is True for what is left out (`key_padding_mask` of torch), or is added to logits.
    """

    def __init__(self, name: str, of: int, inverted: bool):
        self.name, self.of, self.inverted = name, of, inverted

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if kwargs.get(self.name) is not None:  # the tower, which shares this module, knows its tokens' sizes
            return None
        live = live_rows(args[self.of])
        mask = live == 0 if self.inverted else live.log()[:, None, None]
        return args, kwargs | {self.name: mask}


def hang(norm: nn.Module, pool: nn.Module | None, left: Left, first: int, how: PooledRows) -> list[RemovableHandle]:
    """Hangs the hooks that a host needs on its last norm and on what pools by attention, if anything does."""
    handles = [norm.register_forward_hook(NormedRows(left, first))]
    if pool is not None:
        handles.append(pool.register_forward_pre_hook(how, with_kwargs=True))
    return handles
