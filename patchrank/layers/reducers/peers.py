"""Published reducers that act inside a layer, by the attention that its class token pays there: EViT and DiffRate.

All of them act between the attention and the MLP of the layer that a location names, and read the row of attention of
that same layer: after softmax, mean over heads, not renormalised. No reducer here needs training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from patchrank.config import DEFAULTS
from patchrank.layers.macs import merging_macs
from patchrank.layers.merging import num_merging, similarity
from patchrank.layers.pruning import rank, take
from patchrank.layers.reducers.base import Reducer, register_reducer
from patchrank.layers.token_state import TokenState

for _step in ("take", "num_merging"):
    torch.fx.wrap(_step)  # torch.fx cannot follow sizes that these ask for


class RowReader(Reducer):
    """Base of those that read the class token's attention in the layer that they act in."""

    site = "mid"
    needs = ("cls_row",)

    def score(self, state: TokenState) -> Tensor:
        return state.cls_row

    def num_macs(self, tower: nn.Module, reaching: Mapping[int, int]) -> int:
        """One query against all keys in each of the layers; the layer makes both anyway."""
        return sum(reaching.values()) * tower.embed_dim


@register_reducer("evit_drop")
class EvitDrop(RowReader):
    """EViT without its fused token: the most attended patches stay, and the others are dropped.

    As with all rankings, `leftovers: merge` makes the others merge into those that stay instead.
    """

    ranks_anew = True


@register_reducer("evit")
class Evit(RowReader):
    """EViT as published: the most attended patches stay, and all others are fused into one more token.

    The fused token is the sum of its members, each times its attention. These weights are raw: their sum lies below 1,
    and so the token is short. A count n at a location is the net loss: n + 1 patches are fused. Later on the fused
    token is a patch like any other. Attention is not proportional to sizes. In pictures and source maps its place is
    that of its most attended member.
    """

    merges = True

    def reduce(self, state: TokenState, k: int) -> TokenState:
        order = rank(self.score(state))
        gone = order[:, k - 1 :]
        weights = self.weights(take(state.cls_row, gone))
        fused = weights.unsqueeze(1) @ take(state.tokens, gone).float()  # (B, 1, D)
        return state.fused(order, k, fused)

    def weights(self, row: Tensor) -> Tensor:
        """Weights (B, m) of the tokens that are fused, from the attention that they get."""
        return row

    def most(self, num_tokens: int) -> int:
        """One token stays beside the fused one."""
        return max(num_tokens - 2, 0)

    def matching_macs(self, tower: nn.Module, leaving: Mapping[int, tuple[int, int]]) -> int:
        return sum(count + 1 for _, count in leaving.values()) * tower.embed_dim


@register_reducer("evit_norm")
class EvitNorm(Evit):
    """EViT with a fused token that is a mean: the weights of its members sum to 1."""

    def weights(self, row: Tensor) -> Tensor:
        return row / row.sum(-1, keepdim=True).clamp(min=1e-30)  # attention may round to 0


@register_reducer("diffrate")
class DiffRate(RowReader):
    """DiffRate's way to prune and merge, with numbers from our settings in place of the rates that it learns.

    Tokens are sorted by attention. The least attended are dropped. Of the rest the least attended merge, each into the
    most similar one of the kept, by cosine of the tokens as they are; never into the class token. A merged token is the
    plain mean of its members, whatever their sizes. Its size is its own plus those of the others, each times its
    similarity, and later layers attend in proportion to sizes. A negative similarity adds nothing to a size.

    Args:
        drop_share: share of what leaves that is dropped; the rest merges.
    """

    merges = True

    def __init__(self, drop_share: float = DEFAULTS.pruning.drop_share):
        super().__init__()
        self.drop_share = drop_share

    def reduce(self, state: TokenState, k: int) -> TokenState:
        order = rank(self.score(state))
        merging = num_merging(state.tokens.shape[1] - k, self.drop_share)
        kept, gone = order[:, :k], order[:, k : k + merging]
        similar, into = similarity(take(state.tokens, gone), take(state.tokens, kept)).max(-1)
        sizes = state.sizes_or_ones()
        return state.merged(
            lambda x: take(x, kept),
            lambda x: take(x, gone),
            into,
            weights=torch.ones_like(sizes),
            grows=take(sizes, gone) * similar.clamp(min=0),
        )

    def matching_macs(self, tower: nn.Module, leaving: Mapping[int, tuple[int, int]]) -> int:
        return merging_macs(tower, leaving, self.metric, drop_share=self.drop_share)
