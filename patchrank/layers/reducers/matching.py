"""Reducers that merge tokens in pairs inside a layer, as ToMe does, and ours that a ranking guides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from patchrank.config import DEFAULTS
from patchrank.layers.macs import merging_macs
from patchrank.layers.merging import bipartite, upward
from patchrank.layers.pruning import take, z_scored
from patchrank.layers.reducers.base import Metric, Reducer, register_reducer
from patchrank.layers.reducers.rankers import Predictor
from patchrank.layers.token_state import TokenState

for _step in ("take", "bipartite", "upward", "z_scored"):
    torch.fx.wrap(_step)  # torch.fx cannot follow sizes and types that these ask for


class Matching(Reducer):
    """Base of reducers that choose pairs of similar tokens in mid-block; one of each pair merges into the other."""

    site = "mid"
    merges = True
    metric: Metric = "features"

    def match(self, state: TokenState, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens stay, which merge, and into what: kept, gone and into, as `bipartite` returns them."""
        return bipartite(state.metric, count)

    def reduce(self, state: TokenState, k: int) -> TokenState:
        kept, gone, into = self.match(state, state.tokens.shape[1] - k)
        return state.merged(lambda x: take(x, kept), lambda x: take(x, gone), into)

    def most(self, num_tokens: int) -> int:
        return num_tokens // 2

    def num_pairs(self, num_tokens: int) -> int:
        """How many pairs of `num_tokens` tokens are compared."""
        return (num_tokens // 2) * (num_tokens - num_tokens // 2)

    def matching_macs(self, tower: nn.Module, leaving: Mapping[int, tuple[int, int]]) -> int:
        return merging_macs(tower, leaving, self.metric, num_pairs=self.num_pairs)


@register_reducer("tome")
class Tome(Matching):
    """ToMe as published: keys, mean over heads, are compared in mid-block; sizes and proportional attention."""

    metric: Metric = "keys"


@register_reducer("feature_merge")
class FeatureMerge(Matching):
    """ToMe's matching on normed features, norm2(x) in mid-block, in place of keys; needs no training either."""


class Guided(Predictor):
    """Part of a matching: a predictor tells importance once, from the tokens that enter the first location.

    Importance is z-scored over the patches of an image. A token keeps its importance, whatever merges into it.
    """

    observes = "first"

    def observe(self, state: TokenState, layer: int, scores: Tensor | None) -> TokenState:
        scores = self.score(state) if scores is None else scores
        return replace(state, scores=scores, carried=z_scored(scores.float()))


@register_reducer("guided_merge")
class GuidedMerge(Matching, Guided):
    """ToMe's matching with a ranking inside: a pair's score is its similarity less `protection` times importance.

    The importance is that of the token that goes, as a predictor sees it.

    Args:
        predictor: predicts importance.
        metric: what is compared: `features`, or `keys` as ToMe does.
        protection: weight of importance; 0 leaves the matching alone.
    """

    def __init__(self, predictor: nn.Module, metric: Metric = DEFAULTS.pruning.metric, protection: float | None = None):
        super().__init__(predictor)
        self.metric, self.protection = metric, 0.1 if protection is None else protection

    def match(self, state: TokenState, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return bipartite(state.metric, count, self.protection * state.carried)


class Upward(Matching):
    """Part of a matching: a token may merge into any that is more important; `upward` says what a merge costs.

    Args:
        metric: what is compared: `features` or `keys`.
        protection: how steeply the cost rises with the importance of the token that goes.
    """

    def __init__(self, *args, metric: Metric = DEFAULTS.pruning.metric, protection: float | None = None):
        super().__init__(*args)
        self.metric, self.protection = metric, 0.5 if protection is None else protection

    def importance(self, state: TokenState) -> Tensor:
        """The importance of each token, (B, K), z-scored."""
        return state.carried

    def match(self, state: TokenState, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return upward(state.metric, state.sizes_or_ones(), self.importance(state), count, self.protection)

    def most(self, num_tokens: int) -> int:
        return num_tokens - 1

    def num_pairs(self, num_tokens: int) -> int:
        return num_tokens * num_tokens


@register_reducer("rank_merge")
class RankMerge(Upward, Guided):
    """Ranked matching by a predictor: tokens merge into more important ones, as `upward` says.

    Args:
        predictor: predicts importance.
        metric: as of `Upward`.
        protection: as of `Upward`; None for 0.8, since a predictor knows more of importance than class attention does.
    """

    def __init__(self, predictor: nn.Module, metric: Metric = DEFAULTS.pruning.metric, protection: float | None = None):
        super().__init__(predictor, metric=metric, protection=0.8 if protection is None else protection)


@register_reducer("attention_merge")
class AttentionMerge(Upward):
    """Ranked matching without any training: importance is the class token's attention in the layer itself, z-scored."""

    needs = ("cls_row",)

    def __init__(self, metric: Metric = DEFAULTS.pruning.metric, protection: float | None = None):
        super().__init__(metric=metric, protection=protection)

    def importance(self, state: TokenState) -> Tensor:
        return z_scored(state.cls_row)

    def num_macs(self, tower: nn.Module, reaching: Mapping[int, int]) -> int:
        """One query against all keys in each layer that a location names."""
        return sum(reaching.values()) * tower.embed_dim
