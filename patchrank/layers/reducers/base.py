"""The contract between a tower and the reducers of its patch tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from patchrank.layers.pruning import rank, take
from patchrank.layers.registry import Registry
from patchrank.utils.errors import UserError


@dataclass(frozen=True)
class TokenState:
    """Patch tokens on their way through the tower, without class, register and prompt tokens.

    tokens: (B, K, D), those that are left.
    index:  (B, K), the place of each of them in the full grid.
    cls:    (B, D), the class token as it enters this layer.
    sizes:  (B, K), how many patches each token stands for, or None while each stands for itself.
    scores: (B, N), the ranking that persists, over the full grid; once it is set, tokens are in its order.
    sample_key: (B,), a number that depends on a sample's pixels alone; only for reducers that need it.
    cls_row: (B, K), the class token's attention over `tokens` in the layer before; only for reducers that need it.
    """

    tokens: Tensor
    index: Tensor
    cls: Tensor
    sizes: Tensor | None = None
    scores: Tensor | None = None
    sample_key: Tensor | None = None
    cls_row: Tensor | None = None

    def ranked_by(self, scores: Tensor) -> TokenState:
        """All N tokens of the full grid in descending order of `scores` (B, N), the ranking that persists."""
        order = rank(scores)
        return replace(self, scores=scores)._pick(lambda x: take(x, order))

    def first(self, k: int) -> TokenState:
        """The first k tokens: a slice, no gather."""
        return self._pick(lambda x: x[:, :k])

    def best(self, scores: Tensor, k: int) -> TokenState:
        """The k tokens of highest `scores` (B, K), which do not persist. Tokens stay in the grid's order.

        So the lower index wins a tie at the next location too.
        """
        chosen = rank(scores)[:, :k].sort(dim=-1).values
        return self._pick(lambda x: take(x, chosen))

    def _pick(self, pick: Callable[[Tensor], Tensor]) -> TokenState:
        aligned = {name: getattr(self, name) for name in ("tokens", "index", "sizes", "cls_row")}
        return replace(self, **{name: pick(x) for name, x in aligned.items() if x is not None})

    def source(self, num_tokens: int) -> Tensor:
        """The source map (B, num_tokens): which token each patch of the input lives in, -1 where it was dropped."""
        slots = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
        empty = torch.full((len(self.index), num_tokens), -1, device=self.index.device)
        return empty.scatter(1, self.index, slots)


class Reducer(nn.Module):
    """Base of all reducers. One whose ranking never changes overrides `score` alone.

    site:  `before` a layer, or `mid` block (between attention and MLP).
    needs: what the tower must give beside the tokens: `cls_row`, `keys`, `sample_key`, `scores`.
    fitted: whether it ranks by the weights of a predictor file or module.
    """

    site = "before"
    needs: tuple[str, ...] = ()
    fitted = False

    def score(self, state: TokenState) -> Tensor:
        """Scores (B, K) of the tokens of `state`, high = keep."""
        raise UserError(
            f"reducer {type(self).__name__.lower()!r} has no scores of its own: hand them to forward_pruned"
        )

    def reduce(self, state: TokenState, k: int) -> TokenState:
        """Keeps the k best tokens. They are scored and sorted at the first location; later ones take a slice."""
        if state.scores is None:
            state = state.ranked_by(self.score(state))
        return state.first(k)

    def num_macs(self, tower: nn.Module, reaching: dict[int, int]) -> int:
        """MACs of scoring one image in `tower`.

        Args:
            reaching: for each location the length of the sequence before tokens leave, class and prompt tokens too.
        """
        return 0


REDUCERS = Registry("reducer")
register_reducer = REDUCERS.register  # a decorator: makes a class available to `create_reducer`, and so to YAML
create_reducer = REDUCERS.create
