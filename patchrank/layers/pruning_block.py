"""The pruning block: what stands before the layers at which tokens leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from patchrank.layers.reducers import Reducer, TokenState


class PruningBlock(nn.Module):
    """Takes a token sequence apart, lets a reducer choose among the patches, and puts it together again.

    Args:
        reducer: who chooses.
        locations: layers (from 1) before which tokens leave.
        drop_counts: how many leave at each of them.
        num_prefix: tokens before the patches in the sequence; reducers never see them.
    """

    def __init__(self, reducer: Reducer, locations: Sequence[int], drop_counts: Sequence[int], num_prefix: int):
        super().__init__()
        self.reducer = reducer
        self.drops = {layer: count for layer, count in zip(locations, drop_counts) if count}
        self.num_prefix = num_prefix

    def forward(
        self, x: Tensor, state: TokenState, layer: int, scores: Tensor | None = None
    ) -> tuple[Tensor, TokenState]:
        """The sequence (B, P + K, D) and state that enter `layer`; unchanged where nothing leaves before it.

        `scores` (B, N) take the place of the reducer's ranking.
        """
        count = self.drops.get(layer, 0)
        if not count:
            return x, state
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        state = replace(state, tokens=patches, cls=x[:, 0])
        if scores is not None:
            state = state if state.scores is not None else state.ranked_by(scores)
            state = state.first(patches.shape[1] - count)
        else:
            state = self.reducer.reduce(state, patches.shape[1] - count)
        return torch.cat([prefix, state.tokens], dim=1), state
