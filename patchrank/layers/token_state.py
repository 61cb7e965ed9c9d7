"""Patch tokens on their way through a tower: what stays, what merges into it, and where every patch has gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchrank.layers.merging import joined, most_similar, moved, num_merging
from patchrank.layers.pooling import summary
from patchrank.layers.pruning import rank, take

for _step in ("take", "most_similar", "joined", "moved", "num_merging", "log_sizes"):
    torch.fx.wrap(_step)  # torch.fx cannot follow sizes that these ask for, so each is one step of a graph

Pick = Callable[[Tensor], Tensor]  # of what stands beside tokens, (B, K, ...), the part that belongs to some of them
ALIGNED = ("tokens", "index", "sizes", "cls_row", "shift", "carried", "metric")  # fields that have a row for each token


@dataclass(frozen=True)
class TokenState:
    """Patch tokens on their way through the tower, without class, register and prompt tokens.

    tokens: (B, K, D), those that are left.
    index:  (B, K), the place of each of them in the full grid.
    cls:    (B, D), the class token as it enters this layer, or as it is in the middle of it; the mean patch of a tower
            that has none.
    sizes:  (B, K), how many patches each token stands for, or None while each stands for itself.
    homes:  (B, N), which token each patch lives in, -1 where it was dropped; None where none ever merge, and where
            nobody asks for more than an embedding of a reducer that comes with us.
    scores: (B, N), the ranking that persists, over the full grid; of a reducer that ranks, tokens are in its order.
    sample_key: (B,), a number that depends on a sample's pixels alone; only for reducers that need it.
    pixels: (B, N, C * P * P), the patches of the image; only for reducers that need it.
    cls_row: (B, K), the class token's attention to each token, in this layer for a reducer that acts in mid-block, else
            in the layer before; only for reducers that need it.
    shift:  (B, K), by how much the MLP of the layer before changed each token (Euclidean norm); only for reducers that
            need it.
    metric: (B, K, d), by whose cosine tokens are compared; only where tokens merge.
    carried: (B, K), a number of each token that a reducer keeps from one layer to the next.
    bias:   (B, 1, 1, P + K), what proportional attention adds to its logits: log sizes, so that a token that stands for
            several patches is attended to as often as these would be. None while all sizes are 1.
    merge:  whether tokens that leave merge into their most similar one that stays, instead of being dropped.
    drop_share: how much of what leaves, from the end of the ranking, is dropped even so.
    """

    tokens: Tensor
    index: Tensor
    cls: Tensor
    sizes: Tensor | None = None
    homes: Tensor | None = None
    scores: Tensor | None = None
    sample_key: Tensor | None = None
    pixels: Tensor | None = None
    cls_row: Tensor | None = None
    shift: Tensor | None = None
    metric: Tensor | None = None
    carried: Tensor | None = None
    bias: Tensor | None = None
    merge: bool = False
    drop_share: float = 0.0

    def ranked_by(self, scores: Tensor) -> TokenState:
        """All N tokens of the full grid in descending order of `scores` (B, N), the ranking that persists."""
        order = rank(scores)
        return replace(self, scores=scores)._pick(lambda x: take(x, order))

    def first(self, k: int) -> TokenState:
        """The first k tokens: a slice, no gather."""
        return self._leave(k)

    def best(self, scores: Tensor, k: int) -> TokenState:
        """The k tokens of highest `scores` (B, K), which do not persist. Tokens stay in the grid's order.

        So the lower index wins a tie at the next location too.
        """
        order = rank(scores)
        chosen = order[:, :k].sort(dim=-1).values
        return self._leave(k, chosen, order[:, k:])

    def merged(
        self, kept: Pick, gone: Pick, into: Tensor, weights: Tensor | None = None, grows: Tensor | None = None
    ) -> TokenState:
        """Some tokens stay, others join them, and the rest is dropped.

        Args:
            kept, gone: pick the tokens that stay, k of them, and those that merge, m.
            into: (B, m), which of the kept each one joins.
            weights: (B, K), of each token in the mean; its size if left out.
            grows: (B, m), by how much each one adds to the size of what it joins; its own size if left out.
        """
        sizes = self.sizes_or_ones()
        weights = sizes if weights is None else weights
        grows = gone(sizes) if grows is None else grows
        stays = _columns(kept(self.tokens), kept(weights), kept(sizes))
        total = joined(stays, _columns(gone(self.tokens), gone(weights), grows), into)
        tokens = (total[..., :-2] / total[..., -2:-1]).to(self.tokens.dtype)
        homes = self._moved(kept, gone, into)
        # signals are of tokens as they were, and of the others some are made anew
        rest = replace(self, cls_row=None, shift=None, metric=None, tokens=None, sizes=None, homes=None)
        return replace(rest._pick(kept), tokens=tokens, sizes=total[..., -1], homes=homes)

    def fused(self, order: Tensor, k: int, token: Tensor) -> TokenState:
        """The first k - 1 tokens in an order (B, K) stay; all others become one, at the place of the first of them.

        Args:
            token: (B, 1, D), what the others become.
        """
        kept, gone = order[:, :k], order[:, k:]
        state = self._pick(lambda x: take(x, kept))
        tokens = torch.cat([state.tokens[:, : k - 1], token.to(state.tokens.dtype)], dim=1)
        into = torch.zeros_like(gone) + (k - 1)
        return replace(state, tokens=tokens, homes=self._moved(lambda x: take(x, kept), lambda x: take(x, gone), into))

    def source(self, num_tokens: int) -> Tensor:
        """The source map (B, num_tokens): which token each patch of the input lives in, -1 where it was dropped."""
        if self.homes is not None:
            return self.homes
        slots = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
        empty = self.index.new_full((self.index.shape[0], num_tokens), -1)
        return empty.scatter(1, self.index, slots)

    def settled(self, num_leading: int, dtype: torch.dtype) -> TokenState:
        """The state behind a location: with the bias of its sizes, without signals, which were of that layer alone.

        Class, register and prompt tokens, the P = `num_leading` before the patches, stand for themselves.
        """
        bias = None if self.sizes is None else log_sizes(self.sizes, num_leading, dtype)
        return replace(self, bias=bias, cls_row=None, shift=None, metric=None)

    def _leave(self, k: int, chosen: Tensor | None = None, others: Tensor | None = None) -> TokenState:
        """k tokens stay, at places `chosen` (B, k); of the `others` (B, K - k) some or all merge into these.

        Where no places are given, tokens are in their order already.
        """
        kept: Pick = lambda x: x[:, :k] if chosen is None else take(x, chosen)  # noqa: E731
        if not self.merge:
            return self._pick(kept)
        m = num_merging(self.tokens.shape[1] - k, self.drop_share)
        gone: Pick = lambda x: x[:, k : k + m] if others is None else take(x, others[:, :m])  # noqa: E731
        return self.merged(kept, gone, most_similar(gone(self.metric), kept(self.metric)))

    def _pick(self, pick: Pick) -> TokenState:
        values = {name: pick(x) for name in ALIGNED if (x := getattr(self, name)) is not None}
        return replace(self, **values, homes=self._moved(pick))

    def _moved(self, kept: Pick, gone: Pick | None = None, into: Tensor | None = None) -> Tensor | None:
        """Where each patch lives once some tokens are kept and others join them, for a state that knows it."""
        if self.homes is None:
            return None
        places = self._places()
        return moved(self.homes, places, kept(places), None if gone is None else gone(places), into)

    def sizes_or_ones(self) -> Tensor:
        """How many patches each token stands for (B, K), in float32."""
        return torch.ones_like(self.index, dtype=torch.float32) if self.sizes is None else self.sizes

    def _places(self) -> Tensor:
        """0 to K - 1 for each image (B, K)."""
        return torch.ones_like(self.index).cumsum(1) - 1  # torch.fx does not know K


def _columns(tokens: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """Weighted tokens, weights and sizes side by side, (B, K, D + 2), in float32."""
    return torch.cat([tokens.float() * weights[..., None], weights[..., None], sizes[..., None]], dim=-1)


def first_state(x: Tensor, num_leading: int, has_class_token: bool = True) -> TokenState:
    """All patches of a sequence (B, P + N, D), none of which has left yet; P = `num_leading`."""
    patches = x[:, num_leading:]
    index = torch.arange(patches.shape[1], device=x.device).expand(x.shape[0], -1)
    return TokenState(tokens=patches, index=index, cls=summary(x, num_leading, has_class_token))


def log_sizes(sizes: Tensor, num_leading: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, P + K) from sizes (B, K): zeros for P leading tokens, then logarithms."""
    return torch.nn.functional.pad(sizes.log(), (num_leading, 0)).to(dtype)[:, None, None]
