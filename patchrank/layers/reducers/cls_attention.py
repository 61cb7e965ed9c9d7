"""The class token's attention decides, as in the simplest methods of the literature."""

from __future__ import annotations

from torch import Tensor, nn

from patchrank.layers.reducers.base import Reducer, TokenState, register_reducer


@register_reducer("cls_attention")
class ClsAttention(Reducer):
    """Plain CLS attention: after softmax over all tokens, mean over heads, not renormalised, ranked anew each time.

    The row is the previous layer's own; before layer 1, where there is none, it is what layer 1 would attend to.
    """

    needs = ("cls_row",)

    def score(self, state: TokenState) -> Tensor:
        return state.cls_row

    def reduce(self, state: TokenState, k: int) -> TokenState:
        """Keeps the k best tokens by the attention of the layer before."""
        return state.best(self.score(state), k)

    def num_macs(self, tower: nn.Module, reaching: dict[int, int]) -> int:
        """One query against all keys at each location; before layer 1 also the query's and the keys' projections."""
        dim = tower.embed_dim
        projections = (1 + reaching[1]) * dim * dim if 1 in reaching else 0
        return projections + sum(reaching.values()) * dim
