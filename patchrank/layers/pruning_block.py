"""The pruning block: it lets patch tokens leave before the layers that locations name, or inside of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchrank.layers.block_parts import SIGNALS, Seen, check_attention, check_parts, row_of, run_block
from patchrank.layers.class_token import queries_keys
from patchrank.layers.macs import merging_macs
from patchrank.layers.norm_gains import plain_norm
from patchrank.layers.pooling import summary
from patchrank.layers.pruning import patches_of
from patchrank.layers.reducers import Reducer, sample_keys
from patchrank.layers.reducers.base import Metric, check_needs
from patchrank.layers.token_state import TokenState, first_state
from patchrank.utils.errors import UserError


class PrunedOutput(NamedTuple):
    """What a pruned forward gives.

    embedding: (B, E).
    kept: (B, K), places in the full grid.
    scores: (B, N), or None where nothing was ranked once for all.
    source: (B, N), which of the kept tokens each patch lives in, since it was kept or merged; -1 where it was dropped.
        None where nobody asks for it.
    """

    embedding: Tensor
    kept: Tensor
    scores: Tensor | None
    source: Tensor | None


class PruningBlock(nn.Module):
    """Takes a token sequence apart, lets a reducer choose among the patches, and puts it together again.

    Args:
        reducer: chooses which tokens stay.
        locations: layers, counted from 1. Tokens leave before them, or inside of them, as the reducer's `site` says.
        drop_counts: how many tokens leave at each location.
        name: what messages call the reducer.
        merge: tokens that a ranking does not keep merge into those that it keeps, instead of being dropped.
        metric: what tokens are compared by to merge: normed `features` of this layer, or `keys` of the layer before.
        drop_share: share of the tokens that leave which is dropped even where the others merge.
        has_class_token: whether sequences begin with one; reducers see the mean patch in its place where they do not.

    Raises:
        UserError: the reducer needs something that no tower gives at its site.
    """

    def __init__(
        self,
        reducer: Reducer,
        locations: Sequence[int],
        drop_counts: Sequence[int],
        name: str = "",
        merge: bool = False,
        metric: Metric = "features",
        drop_share: float = 0.0,
        has_class_token: bool = True,
    ):
        super().__init__()
        check_needs(reducer, name)
        self.reducer, self.name, self.has_class_token = reducer, name, has_class_token
        self.merge, self.drop_share = merge and not reducer.merges, drop_share
        self.metric = reducer.metric if reducer.merges else metric if merge else None
        self.drops = {layer: count for layer, count in zip(locations, drop_counts) if count}
        self.repair: nn.Module | None = None  # what takes the place of the tower's head while these tokens leave

    @property
    def mid(self) -> bool:
        """Whether tokens leave in the middle of the layers that locations name."""
        return self.reducer.site == "mid"

    @property
    def merges(self) -> bool:
        """Whether tokens that leave may merge into others."""
        return self.merge or self.reducer.merges

    def signals(self, layer: int) -> tuple[str, ...]:
        """Which of `SIGNALS` are read in `layer` for tokens that leave inside of it or before the next one.

        Layer 0 stands for the tower's input: what decides before layer 1 is computed there, ahead of that layer.
        """
        if (layer if self.mid else layer + 1) not in self.drops:
            return ()
        wanted = {*self.reducer.needs, *(["keys"] if self.metric == "keys" else [])}
        return tuple(signal for signal in SIGNALS if signal in wanted)

    def in_parts(self) -> list[int]:
        """The layers that run in two parts, attention and MLP."""
        if self.mid:
            return list(self.drops)
        return [layer - 1 for layer in self.drops if layer > 1 and "shift" in self.reducer.needs]

    @property
    def shared_layer(self) -> int:
        """The last layer up to which a sequence may be computed once and be shared by all that prune it.

        No token has left before it, and no layer before it has to be read.
        """
        first = min(self.drops)
        if self.reducer.observes == "all":
            return 1
        return first if self.mid else max(1, first - bool(self.signals(first - 1)))

    def leaving(self, num_patches: int) -> dict[int, tuple[int, int]]:
        """For each location how many patch tokens there are, and how many of them leave."""
        found = {}
        for layer, count in self.drops.items():
            found[layer] = num_patches, count
            num_patches -= count
        return found

    def num_macs(self, tower: nn.Module, cls_only: bool = False) -> int:
        """MACs of all rankings of one image in `tower`; `cls_only` if its last block computes the class token alone."""
        leading, leaving = tower.num_leading_tokens, self._acting(tower, cls_only)
        return self.reducer.num_macs(tower, {layer: leading + alive for layer, (alive, _) in leaving.items()})

    def matching_macs(self, tower: nn.Module, cls_only: bool = False) -> int:
        """MACs of one image in `tower` for comparing tokens and adding up those that merge; `cls_only` as above."""
        leaving = self._acting(tower, cls_only)
        if not self.merge:
            return self.reducer.matching_macs(tower, leaving)
        total = merging_macs(tower, leaving, self.metric, self.mid, drop_share=self.drop_share)
        if self.metric == "keys" and not self.mid and 1 in leaving:  # no layer has made keys yet
            length = tower.num_leading_tokens + tower.num_patches
            total += length * tower.embed_dim * tower.blocks[0].attn.attn_dim
        return total

    def _acting(self, tower: nn.Module, cls_only: bool) -> dict[int, tuple[int, int]]:
        """As `leaving`, but without the last layer's middle where `cls_only`: no token that leaves there is read."""
        leaving = self.leaving(tower.num_patches)
        if self.mid and cls_only:
            leaving.pop(len(tower.blocks), None)
        return leaving

    def begin(
        self, images: Tensor, x: Tensor, num_leading: int, patch_size: tuple[int, int], mapped: bool = True
    ) -> TokenState:
        """The state of a sequence that enters layer 1, with all N patches.

        Args:
            images: (B, C, H, W), as the tower gets them.
            x: (B, P + N, D).
            num_leading: P, the tokens before the patches.
            patch_size: height and width of a patch in pixels.
            mapped: whether it shall be known where each patch has gone, where tokens merge; an embedding needs no map,
                but a reducer of somebody's own may read it, and always finds it.
        """
        needs = self.reducer.needs
        state = first_state(x, num_leading, self.has_class_token)
        if self.merges:
            mapped = mapped or not type(self.reducer).__module__.startswith("patchrank.")
            state = replace(state, homes=state.index if mapped else None, merge=self.merge, drop_share=self.drop_share)
        if "sample_key" in needs:
            state = replace(state, sample_key=sample_keys(images))
        if "pixels" in needs:
            state = replace(state, pixels=patches_of(images, patch_size))
        return state

    def forward(
        self,
        x: Tensor,
        state: TokenState,
        block: Callable,
        layer: int,
        num_leading: int,
        scores: Tensor | None = None,
    ) -> tuple[Tensor, TokenState]:
        """The sequence (B, P + K, D) and its state as they enter `layer`, once tokens have left before it.

        Args:
            x: (B, P + K, D), as it comes from the layer before.
            block: the block of `layer`.
            layer: from 1.
            num_leading: P, the tokens before the patches, which reducers never see.
            scores: (B, N), which take the place of the reducer's ranking.

        Raises:
            UserError: class attention or keys are needed of this block, and cannot be read.
        """
        if self._observes(layer):
            state = self._holding(state, x, num_leading)
            state = self.reducer.observe(state, layer, scores)
        if self.mid or layer not in self.drops:
            return x, state
        if layer == 1 and self._wanted(0, scores):  # no layer has run yet: this one tells what it will do
            check_attention(block, 1)
            q, k = queries_keys(block, x)
            row = row_of(q[:, :, :1], k, block.attn.scale)
            state = self._told(state, Seen(row, k.mean(1)), num_leading)
        return self._shortened(x, state, block, layer, num_leading, scores)

    def run(
        self, block: Callable, x: Tensor, state: TokenState, layer: int, num_leading: int, scores: Tensor | None = None
    ) -> tuple[Tensor, TokenState]:
        """The output of `layer` for a sequence (B, P + K, D), and the state after it; arguments as of `forward`.

        Tokens leave between its attention and its MLP where the reducer acts inside of layers.

        Raises:
            UserError: the block does not give what the reducer reads, cannot run in parts, or scores come from outside
                for a reducer that takes none.
        """
        wanted = self._wanted(layer, scores)
        inside = self.mid and layer in self.drops
        if wanted:  # what hangs on a block may have changed since pruning was set
            check_attention(block, layer)
        if inside or "shift" in wanted:
            check_parts(block, layer)

        def middle(y: Tensor, seen: Seen) -> Tensor:
            nonlocal state
            state = self._told(state, seen, num_leading)
            y, state = self._shortened(y, state, block, layer, num_leading, scores)
            return y

        x, seen = run_block(block, x, state.bias, wanted, middle if inside else None)
        return x, self._told(state, seen, num_leading) if wanted and not inside else state

    def _observes(self, layer: int) -> bool:
        """Whether the reducer takes note of the tokens that enter `layer`."""
        first, last = min(self.drops), max(self.drops)
        return layer in {None: (), "first": (first,), "all": range(1, last + 1)}[self.reducer.observes]

    def _wanted(self, layer: int, scores: Tensor | None) -> tuple[str, ...]:
        """What is read in `layer`; where scores come from outside, only what tokens are compared by."""
        return tuple(signal for signal in self.signals(layer) if scores is None or signal == "keys")

    def _told(self, state: TokenState, seen: Seen, num_leading: int) -> TokenState:
        """The state with what was read in a layer, for the patches alone."""
        row, keys, shift = (x if x is None else x[:, num_leading:] for x in (seen.cls_row, seen.keys, seen.shift))
        return replace(state, cls_row=row, shift=shift, metric=keys if self.metric == "keys" else None)

    def _holding(self, state: TokenState, x: Tensor, num_leading: int) -> TokenState:
        """The state with the tokens as they are now in a sequence (B, P + K, D)."""
        return replace(state, tokens=x[:, num_leading:], cls=summary(x, num_leading, self.has_class_token))

    def _shortened(
        self, x: Tensor, state: TokenState, block: Callable, layer: int, num_leading: int, scores: Tensor | None
    ) -> tuple[Tensor, TokenState]:
        """The sequence (B, P + K, D) and its state, once the tokens have left that leave at `layer`."""
        state = self._holding(state, x, num_leading)
        if self.metric == "features":
            state = replace(state, metric=plain_norm(block, 2 if self.mid else 1, state.tokens))
        state = self._chosen(state, state.tokens.shape[1] - self.drops[layer], scores)
        return torch.cat([x[:, :num_leading], state.tokens], dim=1), state.settled(num_leading, x.dtype)

    def _chosen(self, state: TokenState, k: int, scores: Tensor | None) -> TokenState:
        """k tokens, chosen by the reducer or by scores (B, N) from outside."""
        if scores is None or (self.mid and self.reducer.observes):
            state = self.reducer.reduce(state, k)
        elif self.mid:
            raise UserError(f"reducer {self.name!r} chooses inside a layer and takes no scores from outside")
        else:
            state = state if state.scores is not None else state.ranked_by(scores)
            state = state.first(k)
        if self.merge and state.sizes is None:
            raise UserError(f"reducer {self.name!r} drops what it does not keep, so leftovers must be 'drop'")
        return state
