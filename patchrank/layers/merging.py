"""Tokens that merge: which are alike, and what becomes of them. Pure functions on tensors.

Shapes: B images, K tokens, k of them kept, m that merge into those, d width of what is compared, D width of a token.
Everything is computed in float32, whatever the tower's precision. Sums are products with a one-hot matrix, which are
the same on every run, compile to one graph and have a form in every export format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.layers.pruning import rank, take


def unit(x: Tensor) -> Tensor:
    """Vectors (..., d) over their length, whose products are cosines."""
    return F.normalize(x.float(), dim=-1)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (B, m, k) of `a` (B, m, d) to `b` (B, k, d)."""
    return unit(a) @ unit(b).transpose(1, 2)


def most_similar(gone: Tensor, kept: Tensor) -> Tensor:
    """For each of `gone` (B, m, d) the place (B, m) of its most similar one among `kept` (B, k, d)."""
    return similarity(gone, kept).argmax(-1)


def bipartite(metric: Tensor, count: int, penalty: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's matching: every second token may merge into one of the others, and the `count` best pairs do.

    Tokens 0, 2, 4, ... are never the ones that go. With the class token before them, as ToMe counts, these are the odd
    places of the sequence.

    Args:
        metric: (B, K, d), compared by cosine.
        count: how many merge, at most K // 2.
        penalty: (B, K), by which a pair's score is lowered for the token that goes.

    Returns:
        kept (B, K - count): places of the tokens that stay, those that might have gone first.
        gone (B, count): places of those that merge.
        into (B, count): which of `kept` each of them merges into.
    """
    vectors = unit(metric)
    score, target = (vectors[:, 1::2] @ vectors[:, ::2].transpose(1, 2)).max(-1)
    if penalty is not None:
        score = score - penalty[:, 1::2]
    order = rank(score)
    going, staying = order[:, :count], order[:, count:].sort(dim=-1).values
    others = torch.arange(0, metric.shape[1], 2, device=metric.device).expand(metric.shape[0], -1)
    kept = torch.cat([2 * staying + 1, others], dim=1)
    return kept, 2 * going + 1, staying.shape[1] + target.gather(1, going)


def joined(kept: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """Rows (B, k, c) to which those that go are added, each to the one that it joins.

    Args:
        kept, gone: (B, k, c) and (B, m, c), in float32.
        into: (B, m), which of the kept each of the others joins.
    """
    joins = into.unsqueeze(1) == torch.arange(kept.shape[1], device=into.device)[:, None]  # (B, k, m)
    return kept + joins.float() @ gone  # not in place, since autocast rounds the product


def upward(
    metric: Tensor, sizes: Tensor, importance: Tensor, count: int, protection: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Ranked matching: a token may merge into any that is more important, and those that cost least do.

    Merging tokens i and j costs what it adds to the squared distances of unit vectors from the mean that stands for
    them (Ward's criterion), s_i s_j / (s_i + s_j) * (1 - cos_ij), times exp(protection * importance_i) for the token i
    that goes. Those tokens go whose cheapest merge into a more important one costs least, so the most important one
    always stays. Nothing merges into a token that goes itself: each joins the one that costs least of all that stay,
    which may be a less important one.

    Args:
        metric: (B, K, d), compared by cosine.
        sizes: (B, K), s.
        importance: (B, K), z-scored; among ties the lower place counts as more important.
        count: how many merge, at most K - 1.
        protection: 0 for Ward's criterion alone, with importance deciding only which of two tokens goes.

    Returns:
        kept (B, K - count): places of the tokens that stay, in descending importance.
        gone, into: as `bipartite`.
    """
    order = rank(importance)
    metric, sizes, importance = (take(x, order) for x in (unit(metric), sizes, importance))
    cost = 1 / (1 / sizes[:, :, None] + 1 / sizes[:, None]) * (1 - metric @ metric.transpose(1, 2))  # (B, K, K)
    behind = torch.full_like(cost[0], torch.inf).triu()  # a token itself, and all that are less important
    cheapest = (cost + behind).amin(-1) * (protection * importance).exp()
    by_cost = cheapest.argsort(dim=-1, stable=True)
    going, staying = by_cost[:, :count], by_cost[:, count:].sort(dim=-1).values
    to_those_that_stay = take(cost, going).gather(2, staying.unsqueeze(1).expand(-1, count, -1))
    return order.gather(1, staying), order.gather(1, going), to_those_that_stay.argmin(-1)


def num_merging(num_leaving: int, drop_share: float) -> int:
    """How many of the tokens that leave merge, where a share of them is dropped; halves are dropped."""
    return num_leaving - int(drop_share * num_leaving + 0.5)


def moved(
    homes: Tensor, places: Tensor, kept: Tensor, gone: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    """Where each patch lives (B, N) after some tokens were kept, merged and dropped.

    Args:
        homes: (B, N), which token each patch lived in, -1 where it had been dropped.
        places: (B, K), 0 to K - 1 for each image.
        kept: (B, k), places of the tokens that stay, in their new order.
        gone, into: (B, m), places of those that merge, and which of the kept each one joins; all others are dropped.
    """
    slot = torch.full_like(places, -1).scatter(1, kept, places[:, : kept.shape[1]])
    if gone is not None:
        slot = slot.scatter(1, gone, into)
    return torch.where(homes >= 0, slot.gather(1, homes.clamp(min=0)), -1)
