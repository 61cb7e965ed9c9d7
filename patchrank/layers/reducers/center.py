"""A control that does not look at the image: patches near the centre of the grid stay."""

from __future__ import annotations

import torch
from torch import Tensor

from patchrank.layers.reducers.base import Reducer, TokenState, register_reducer


@register_reducer("center")
class Center(Reducer):
    """Scores by minus the squared distance, in patches, from a patch's place to the grid's centre."""

    def __init__(self, grid_size: tuple[int, int]):
        super().__init__()
        self.grid_size = grid_size

    def score(self, state: TokenState) -> Tensor:
        # no buffer, since in a tower of half precision it would be rounded, and distances would be tied
        rows, columns = (torch.arange(side, device=state.index.device) - (side - 1) / 2 for side in self.grid_size)
        return -(rows[:, None] ** 2 + columns**2).flatten()[state.index]
