"""The contract of reducers with a tower, and their registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from patchrank.layers.registry import Registry
from patchrank.layers.token_state import TokenState
from patchrank.utils.errors import UserError, near

Metric = Literal["features", "keys"]
NEEDS = ("cls_row", "shift", "sample_key", "pixels", "scores")  # what a tower can give beside the tokens


class Reducer(nn.Module):
    """Base of all reducers. One that ranks overrides `score` alone.

    site:  `before` a layer, or `mid` block: inside the layer that a location names, between attention and MLP.
    needs: which of `NEEDS` the tower must give; `shift` only before a layer, since the MLP comes after its middle.
    merges: whether it merges tokens by a rule of its own, so that the setting `leftovers` does not apply. Other
        reducers rank, and the tokens that they do not keep are dropped or merge, as the state's `merge` says.
    metric: what tokens are compared by, for a reducer that merges by itself; None for tokens as they are.
    ranks_anew: whether it ranks the tokens that are left at each location, instead of once for all at the first.
    observes: whether `observe` sees the tokens that enter each layer, those of the `first` location's alone, or none.
    first_location: the first layer that a location may name.
    fitted: whether it ranks by the weights of a predictor file or module.
    """

    site: Literal["before", "mid"] = "before"
    needs: tuple[str, ...] = ()
    merges = False
    metric: Metric | None = None
    ranks_anew = False
    observes: Literal["first", "all"] | None = None
    first_location = 1
    fitted = False

    def score(self, state: TokenState) -> Tensor:
        """Scores (B, K) of the tokens of `state`, high = keep."""
        raise UserError(
            f"reducer {type(self).__name__.lower()!r} has no scores of its own: hand them to forward_pruned, or choose "
            "another reducer"
        )

    def reduce(self, state: TokenState, k: int) -> TokenState:
        """Keeps the k best tokens. What is ranked once for all is sorted at the first location and sliced later."""
        if self.ranks_anew:
            return state.best(self.score(state), k)
        if state.scores is None:
            state = state.ranked_by(self.score(state))
        return state.first(k)

    def observe(self, state: TokenState, layer: int, scores: Tensor | None) -> TokenState:
        """Takes note of the tokens that enter a layer, where `observes` asks for it, before any of them leaves.

        Args:
            layer: from 1.
            scores: (B, N) from outside, for a reducer that acts in mid-block to rank by instead of its own.
        """
        return state

    def most(self, num_tokens: int) -> int:
        """How many of `num_tokens` patch tokens may leave at one location, at the most."""
        return num_tokens - 1

    def num_macs(self, tower: nn.Module, reaching: Mapping[int, int]) -> int:
        """MACs of scoring one image in `tower`.

        Args:
            reaching: for each location the length of the sequence before tokens leave, class and prompt tokens too.
        """
        return 0

    def matching_macs(self, tower: nn.Module, leaving: Mapping[int, tuple[int, int]]) -> int:
        """MACs of a reducer that merges by itself: comparing tokens, and adding up those that merge.

        Args:
            leaving: for each location how many patch tokens there are, and how many of them leave.
        """
        return 0


def check_needs(reducer: Reducer, name: str) -> None:
    """Raises `UserError` where a reducer needs what no tower gives, or not at its site."""
    needs = (reducer.needs,) if isinstance(reducer.needs, str) else reducer.needs
    for need in needs:
        if need not in NEEDS:
            raise UserError(f"reducer {name!r} needs {need!r}, which no tower gives; {near(need, NEEDS)}")
    if isinstance(reducer.needs, str):
        raise UserError(f"reducer {name!r}: needs must be a tuple of names; try needs = ({reducer.needs!r},)")
    if reducer.site == "mid" and "shift" in needs:
        raise UserError(
            f"reducer {name!r} needs 'shift' in mid-block, but the MLP runs only after that; try site = 'before'"
        )


REDUCERS = Registry("reducer")
register_reducer = REDUCERS.register  # a decorator: makes a class available to `create_reducer`, and so to YAML
create_reducer = REDUCERS.create
