"""Exact search by cosine, and what two searches have in common: pure functions on tensors.

A search has one outcome: cosines are taken in float64 and compared in steps of 2^-30, so that neither chunks nor
kernels decide who is nearer, and among equals the lower place comes first.

Shapes: Q queries, M candidates of an index, E width of embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress

CHUNK = 4096  # queries and candidates at a time: about half a GB beside the embeddings
STEPS, PLACES = 1 << 30, 1 << 32  # a key is a cosine in steps of 2^-30 and, in its lower half, a place


class Nearest(NamedTuple):
    """cosine (Q, k), nearest first, float64; place (Q, k) in the index."""

    cosine: Tensor
    place: Tensor


def nearest(
    queries: Tensor,
    index: Tensor,
    k: int,
    own: Tensor | None = None,
    chunk: int = CHUNK,
    what: str = "nearest",
    quiet: bool = True,
) -> Nearest:
    """The k nearest of an index by cosine, among equals the lower place first.

    Args:
        queries, index: (Q, E) and (M, E) of any length but zero, on one device.
        own: (Q,), the place that each query leaves out.
        chunk: queries and candidates that are compared at a time; changes memory and time alone.
        what: names the progress bar, which appears once a search takes seconds.

    Raises:
        UserError: fewer than k candidates.
    """
    candidates = len(index) if own is None else len(index) - 1
    if not 1 <= k <= candidates:
        raise UserError(f"k must lie in 1..{candidates}, the number of candidates, but is {k}")
    best = []
    for start in progress(range(0, len(queries), chunk), desc=what, unit="chunk", delay=2, disable=quiet):
        some = slice(start, start + chunk)
        best.append(_best(queries[some], index, k, None if own is None else own[some], chunk))
    keys = torch.cat(best)
    return Nearest((keys // PLACES).double() / STEPS, PLACES - 1 - keys % PLACES)


def _best(queries: Tensor, index: Tensor, k: int, own: Tensor | None, chunk: int) -> Tensor:
    """Keys (Q, k), highest first, from one part of the index after another."""
    queries, best = _unit(queries), None
    for start in range(0, len(index), chunk):
        part = index[start : start + chunk]
        # keys order by cosine, then by lower place; no two of a row are equal, so `topk` has no choice
        place = torch.arange(start, start + len(part), device=part.device)
        keys = (queries @ _unit(part).T).mul_(STEPS).round_().long().mul_(PLACES).add_(PLACES - 1 - place)
        if own is not None:
            here = ((own >= start) & (own < start + len(part))).nonzero()[:, 0]
            keys[here, own[here] - start] = torch.iinfo(torch.int64).min
        top = keys.topk(min(k, len(part))).values
        best = top if best is None else torch.cat([best, top], dim=1)
        best = best.topk(min(k, best.shape[1])).values
    return best


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.double(), dim=-1)


def own_distance(queries: Tensor, index: Tensor, own: Tensor) -> Tensor:
    """1 - cosine (Q,) of each query to its own candidate, float64; exactly 0 where they are equal."""
    pairs = zip(queries.split(CHUNK), own.split(CHUNK))
    return torch.cat([(_unit(some) - _unit(index[places])).square().sum(-1) / 2 for some, places in pairs])


def is_within(found: Nearest, distance: Tensor, k: int) -> Tensor:
    """Whether fewer than k candidates are nearer to each query than at `distance` (Q,); equals are not nearer."""
    return found.cosine[:, k - 1] <= 1 - distance + 1 / STEPS


def shared(ours: Nearest, theirs: Nearest, k: int) -> Tensor:
    """Share (Q,), from 0 to 1, of their k nearest that are among our k nearest."""
    both = torch.cat([ours.place[:, :k], theirs.place[:, :k]], dim=1).sort(dim=1).values
    return (both[:, 1:] == both[:, :-1]).sum(1).double() / k
