"""Reducers that merge tokens in pairs inside a layer, as ToMe does, and ours that a ranking guides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from patchrank.config import DEFAULTS
from patchrank.layers.merging import bipartite, joining_macs
from patchrank.layers.pruning import importance, take
from patchrank.layers.reducers.base import Metric, Reducer, register_reducer
from patchrank.layers.reducers.rankers import Predictor
from patchrank.layers.token_state import TokenState

for _step in ("take", "bipartite", "importance"):
    torch.fx.wrap(_step)  # torch.fx cannot follow sizes and types that these ask for


class Matching(Reducer):
    """Every second token may merge into its most similar one of the others; the most similar pairs do."""

    site = "mid"
    merges = True
    metric: Metric = "features"

    def penalty(self, state: TokenState) -> Tensor | None:
        """(B, K), by which the score of a pair is lowered for the token that goes; None for none."""
        return None

    def reduce(self, state: TokenState, k: int) -> TokenState:
        count = state.tokens.shape[1] - k
        kept, gone, into = bipartite(state.metric, count, self.penalty(state))
        return state.merged(lambda x: take(x, kept), lambda x: take(x, gone), into)

    def most(self, num_tokens: int) -> int:
        return num_tokens // 2

    def matching_macs(self, tower: nn.Module, leaving: Mapping[int, tuple[int, int]]) -> int:
        width = tower.embed_dim if self.metric == "features" else tower.blocks[0].attn.head_dim
        pairs = sum((alive // 2) * (alive - alive // 2) for alive, _ in leaving.values())
        joins = sum(joining_macs(count, alive - count, tower.embed_dim) for alive, count in leaving.values())
        return pairs * width + joins


@register_reducer("tome")
class Tome(Matching):
    """ToMe as published: keys, mean over heads, are compared in mid-block; sizes and proportional attention."""

    metric: Metric = "keys"


@register_reducer("feature_merge")
class FeatureMerge(Matching):
    """ToMe's matching on normed features, norm2(x) in mid-block, in place of keys; needs no training either."""


@register_reducer("guided_merge")
class GuidedMerge(Matching, Predictor):
    """Ranking inside the matching: a pair's score is its similarity less `protection` times predicted importance.

    The importance is that of the token that goes, z-scored over the patches of an image. A predictor tells it once,
    from the tokens that enter the first location, and a token keeps it whatever merges into it.

    Args:
        predictor: predicts importance.
        metric: what is compared: `features`, or `keys` as ToMe does.
        protection: weight of importance; 0 leaves the matching alone.
    """

    observes = "first"

    def __init__(
        self,
        predictor: nn.Module,
        metric: Metric = DEFAULTS.pruning.metric,
        protection: float = DEFAULTS.pruning.protection,
    ):
        super().__init__(predictor)
        self.metric, self.protection = metric, protection

    def observe(self, state: TokenState, layer: int, scores: Tensor | None) -> TokenState:
        scores = self.score(state) if scores is None else scores
        return replace(state, scores=scores, carried=importance(scores.float()))

    def penalty(self, state: TokenState) -> Tensor | None:
        return self.protection * state.carried
