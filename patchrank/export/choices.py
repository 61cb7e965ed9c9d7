"""What a forward ranks and chooses by: noted, or forced to be what another forward chose.

Rounding may swap two tokens of nearly the same score, and from there on embeddings are of other tokens. So two forms of
one tower are compared in two steps: first scores and choices, then embeddings with the same choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from patchrank.utils.errors import UserError

CHOOSING = ("argsort", "sort", "topk", "argmax", "argmin", "max", "min")


class Step(NamedTuple):
    """One choice: what was looked at, and the places that were chosen along its last dimension.

    scores: (B, ..., K).
    index: (B, ..., K) where all were sorted, or (B, ...), the place of the largest or smallest.
    """

    scores: Tensor
    index: Tensor

    @classmethod
    def of(cls, scores: Tensor, found: object) -> Step | None:
        """A step from what a function of `CHOOSING` was given and gave; None where it chose nothing, as a plain max."""
        index = found[1] if isinstance(found, tuple | list) and len(found) == 2 else found
        if isinstance(index, Tensor) and index.dtype is torch.int64 and index.ndim >= scores.ndim - 1 > 0:
            return cls(scores, index)
        return None

    def unfit(self, other: Tensor, descending: bool) -> Tensor:
        """By how much other scores (B, ..., K) contradict this choice, for each image (B,); 0 where they agree.

        Args:
            descending: whether the largest come first, or are chosen.
        """
        other = other if descending else -other
        if self.index.ndim == other.ndim:
            ordered = other.gather(-1, self.index)
            found = (ordered[..., 1:] - ordered[..., :-1]).clamp(min=0)
        else:
            found = other.amax(-1) - other.gather(-1, self.index.unsqueeze(-1)).squeeze(-1)
        return found.flatten(1).amax(1) if found[0].numel() else found.new_zeros(len(found))


class Choices(TorchFunctionMode):
    """A block in which torch's sorting and choosing functions are noted.

    Args:
        forced: indices, one of each step in their order, that take the place of what is chosen.

    Attributes:
        steps: what was looked at and chosen.
        descending: of each step, whether the largest come first.
    """

    def __init__(self, forced: Sequence[Tensor] | None = None):
        super().__init__()
        self.forced = None if forced is None else list(forced)
        self.steps: list[Step] = []
        self.descending: list[bool] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        step = Step.of(args[0], found) if name in CHOOSING and isinstance(args[0], Tensor) else None
        if step is None:
            return found
        if self.forced is not None:
            found, step = self._forced(found, step)
        self.steps.append(step)
        usual = name in ("topk", "max", "argmax")
        self.descending.append(kwargs.get("descending", kwargs.get("largest", usual)))
        return found

    def _forced(self, found: object, step: Step) -> tuple[object, Step]:
        place = len(self.steps)
        if place >= len(self.forced) or self.forced[place].numel() != step.index.numel():
            raise UserError(
                f"the file does not choose as this tower does, from choice {place + 1} on; try to export anew"
            )
        index = self.forced[place].to(step.index).view_as(step.index)
        step = Step(step.scores, index)
        if not isinstance(found, tuple):
            return index, step
        places = index if index.ndim == step.scores.ndim else index.unsqueeze(-1)
        values = step.scores.gather(-1, places).view_as(index)
        return type(found)((values, index)), step
