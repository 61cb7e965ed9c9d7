"""The pruning block: what stands before the layers at which tokens leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from patchrank.layers.class_token import check_attention
from patchrank.layers.reducers import Reducer, TokenState
from patchrank.utils.errors import UserError


def check_prunable(tower: nn.Module, pruner: PruningBlock) -> None:
    """Refuses a tower from which tokens cannot leave, or not by the reducer of `pruner`.

    Raises:
        UserError: other pooling than by the class token, a changing image size, patches dropped at random, no class
            attention where it decides.
    """
    if tower.global_pool not in ("token", ""):
        raise UserError(f"pruning needs pooling by the class token, but global_pool is {tower.global_pool!r}")
    check_grid(tower, "pruning")
    rows = [max(layer, 1) for layer in range(len(tower.blocks)) if pruner.wants_row(layer)]
    if rows and not tower.has_class_token:
        raise UserError("ranking by class attention needs a class token, but this tower has none")
    for layer in rows:
        check_attention(tower.blocks, layer)


def check_grid(tower: nn.Module, what: str) -> None:
    """Refuses a tower whose sequences do not always begin with all patches of one grid; `what` needs that."""
    if tower.dynamic_img_size:
        raise UserError(f"{what} needs a fixed image size, but dynamic_img_size is on: give img_size instead")
    if not isinstance(tower.patch_drop, nn.Identity):
        raise UserError(f"{what} needs all patches of the grid, but patch_drop_rate drops some before layer 1")


def without_mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """x itself. Raises `UserError` for an attention mask, with which pruning and prompts do not go together."""
    if attn_mask is not None or is_causal:
        raise UserError(
            "attention masks do not go together with pruning or prompts: tokens leave or come, and the mask would not "
            "fit"
        )
    return x


class PruningBlock(nn.Module):
    """Takes a token sequence apart, lets a reducer choose among the patches, and puts it together again.

    Args:
        reducer: who chooses.
        locations: layers (from 1) before which tokens leave.
        drop_counts: how many leave at each of them.
    """

    def __init__(self, reducer: Reducer, locations: Sequence[int], drop_counts: Sequence[int]):
        super().__init__()
        self.reducer = reducer
        self.drops = {layer: count for layer, count in zip(locations, drop_counts) if count}
        self.repair: nn.Module | None = None  # what takes the place of the tower's head while these tokens leave

    def wants_row(self, layer: int) -> bool:
        """Whether class attention in `layer`, 0 for the tower's input, decides what leaves before the next one."""
        return "cls_row" in self.reducer.needs and layer + 1 in self.drops

    def num_macs(self, tower: nn.Module) -> int:
        """MACs of all rankings of one image in `tower`."""
        reaching, length = {}, tower.num_leading_tokens + tower.num_patches
        for layer, count in self.drops.items():
            reaching[layer] = length
            length -= count
        return self.reducer.num_macs(tower, reaching)

    def forward(
        self, x: Tensor, state: TokenState, layer: int, num_leading: int, scores: Tensor | None = None
    ) -> tuple[Tensor, TokenState]:
        """The sequence (B, P + K, D) and state that enter `layer`; unchanged where nothing leaves before it.

        Reducers never see the P = `num_leading` tokens before the patches. `scores` (B, N) take the place of the
        reducer's ranking.
        """
        count = self.drops.get(layer, 0)
        if not count:
            return x, state
        leading, patches = x[:, :num_leading], x[:, num_leading:]
        state = replace(state, tokens=patches, cls=x[:, 0])
        if scores is not None:
            state = state if state.scores is not None else state.ranked_by(scores)
            state = state.first(patches.shape[1] - count)
        else:
            state = self.reducer.reduce(state, patches.shape[1] - count)
        return torch.cat([leading, state.tokens], dim=1), state
