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

CHOOSING = {  # functions that rank or choose: which argument says that the largest come first, its place, its default
    "argsort": ("descending", 2, False),
    "sort": ("descending", 2, False),
    "topk": ("largest", 3, True),
    "argmax": ("", 9, True),
    "argmin": ("", 9, False),
    "max": ("", 9, True),
    "min": ("", 9, False),
}


class Step(NamedTuple):
    """One choice: what was looked at, and the places that were chosen along its last dimension.

    scores: (B, ..., K).
    index: (B, ..., K) where all were sorted, or (B, ...), the place of the largest or smallest.
    """

    scores: Tensor
    index: Tensor

    @classmethod
    def of(cls, name: str, scores: object, found: object) -> Step | None:
        """A step from what a function was given and gave; None where it chose none, as the larger of two tensors."""
        if name not in CHOOSING or not isinstance(scores, Tensor):
            return None
        if isinstance(found, tuple | list) and len(found) == 2:
            return cls(scores, found[1]) if found[1].numel() else None  # of nothing, which ONNX leaves out
        is_index = name.startswith("arg") and isinstance(found, Tensor) and found.ndim >= scores.ndim - 1 > 0
        return cls(scores, found) if is_index and found.numel() else None

    def unfit(self, other: Tensor, descending: bool) -> Tensor:
        """By how much other scores (B, ..., K) contradict this choice, for each image (B,); 0 where they agree.

        Args:
            descending: whether the largest come first, or are chosen.
        """
        other = other if descending else -other
        if self.index.ndim == other.ndim:
            ordered = other.gather(-1, self.index)
            left = other.scatter(-1, self.index, -torch.inf).amax(-1, keepdim=True)  # the best of what was not chosen
            found = torch.cat([ordered[..., 1:], left], dim=-1) - ordered
        else:
            found = other.amax(-1, keepdim=True) - other.gather(-1, self.index.unsqueeze(-1))
        found = found.nan_to_num(nan=0.0, posinf=torch.inf).clamp(min=0).flatten(1)  # nan: both scores are infinite
        return found.amax(1)


class Choices(TorchFunctionMode):
    """A block in which torch's sorting and choosing functions are noted.

    Args:
        forced: indices, one of each step in their order, that take the place of what is chosen.

    Attributes:
        steps: what was looked at and chosen.
        descending: of each step, whether the largest come first.

    Raises:
        UserError: more is chosen in the block than `forced` has indices for, or less, or of another count.
    """

    def __init__(self, forced: Sequence[Tensor] | None = None):
        super().__init__()
        self.forced = None if forced is None else list(forced)
        self.steps: list[Step] = []
        self.descending: list[bool] = []

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        if kind is None and self.forced is not None and len(self.steps) < len(self.forced):
            raise self._other_choice()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        step = Step.of(name, args[0] if args else kwargs.get("input"), found)
        if step is None:
            return found
        if self.forced is not None:
            found, step = self._forced(found, step)
        self.steps.append(step)
        key, place, usual = CHOOSING[name]
        self.descending.append(args[place] if len(args) > place else kwargs.get(key, usual))
        return found

    def _other_choice(self) -> UserError:
        place = len(self.steps) + 1
        return UserError(f"the file does not choose as this tower does, from choice {place} on; try to export anew")

    def _forced(self, found: object, step: Step) -> tuple[object, Step]:
        place = len(self.steps)
        if place >= len(self.forced) or self.forced[place].numel() != step.index.numel():
            raise self._other_choice()
        index = self.forced[place].to(step.index).view_as(step.index)
        step = Step(step.scores, index)
        if not isinstance(found, tuple):
            return index, step
        places = index if index.ndim == step.scores.ndim else index.unsqueeze(-1)
        values = step.scores.gather(-1, places).view_as(index)
        return type(found)((values, index)), step
