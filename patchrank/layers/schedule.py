"""How many tokens leave where: from a keep rate, from counts, or from a budget of multiply-accumulates (MACs)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from patchrank.utils.errors import UserError
from patchrank.utils.plain import plain


def num_kept(num_tokens: int, keep_rate: float) -> int:
    """Tokens left of `num_tokens` at a keep rate in (0, 1]; halves round up, one token always stays."""
    num_tokens, keep_rate = plain((num_tokens, keep_rate))
    if not 0 < keep_rate <= 1:
        raise UserError(f"keep_rate must lie in (0, 1], but is {keep_rate}")
    return max(1, int(keep_rate * num_tokens + 0.5))


def check_locations(locations: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layer numbers, counted from 1, just before which tokens leave (section 3.2, "Token Removal")."""
    locations = plain(tuple(locations))
    if not locations or any(type(layer) is not int or not 1 <= layer <= depth for layer in locations):
        spread = _spread(depth)
        cure = f"; try {spread}, as a flag --locations {' '.join(map(str, spread))}" if len(locations) > 1 else ""
        raise UserError(
            f"locations must be layer numbers from 1 to the tower's depth {depth}, but are {locations}{cure}"
        )
    if any(a >= b for a, b in zip(locations, locations[1:])):
        raise UserError(f"locations must increase, but are {locations}; try {tuple(sorted(set(locations)))}")
    return locations


def _spread(depth: int) -> tuple[int, ...]:
    """Layers of a tower that are as far down as the usual ones are of twelve."""
    return tuple(sorted({max(1, round(layer * depth / 12)) for layer in (4, 6, 8, 10)}))


def drop_schedule(
    num_tokens: int,
    keep_rate: float,
    locations: Sequence[int],
    drop_counts: Sequence[int] | None = None,
    taper: float = 1.0,
    most: Callable[[int], int] | None = None,
) -> tuple[int, ...]:
    """How many tokens leave at each location.

    `drop_counts` wins over `keep_rate` where it is given (tables 4 and 5 drop 20 at each of four).

    Args:
        taper: what leaves at a location, as a share of what left at the one before.
        most: tells how many of a number of tokens can leave at once (`Reducer.most`); a keep rate is checked by it.

    Raises:
        UserError: a keep rate or counts that the number of tokens, the locations or `most` do not allow.
    """
    num_tokens = plain(num_tokens)
    if drop_counts is None:
        counts = tapered(num_tokens - num_kept(num_tokens, keep_rate), len(locations), taper)
        if most is not None and clipped(num_tokens, counts, most) != counts:
            raise UserError(
                f"keep_rate {keep_rate} lets {', '.join(map(str, counts))} of {num_tokens} patch tokens leave at "
                f"locations {', '.join(map(str, locations))}, "
                "but this reducer takes fewer at once (half of those that are there, where it merges in pairs); "
                "try more locations or a higher keep_rate"
            )
        return counts
    counts = plain(tuple(drop_counts))
    if len(counts) != len(locations) or any(type(n) is not int or n < 0 for n in counts):
        raise UserError(f"drop_counts must be one count >= 0 for each of {len(locations)} locations, but is {counts}")
    if any(counts) and not counts[0]:
        raise UserError(f"drop_counts must begin above 0, since tokens are ranked there, but is {counts}")
    if sum(counts) >= num_tokens:
        raise UserError(f"drop_counts must leave a token, but {counts} removes {sum(counts)} of {num_tokens}")
    return counts


def tapered(num_leaving: int, places: int, taper: float = 1.0) -> tuple[int, ...]:
    """Splits what leaves over several places: each loses `taper` times as many as the one before, rounded.

    At `taper` 1 counts are as equal as integers allow. Of equal remainders the earlier place is rounded up.
    """
    weights = [taper**place for place in range(places)]
    shares = [num_leaving * weight / sum(weights) for weight in weights]
    counts = [int(share + 1e-9) for share in shares]
    by_remainder = sorted(range(places), key=lambda place: round(counts[place] - shares[place], 9))
    for place in by_remainder[: num_leaving - sum(counts)]:
        counts[place] += 1
    return tuple(counts)


def aligned(
    num_tokens: int, counts: Sequence[int], align: int, num_leading: int, most: Callable[[int], int]
) -> tuple[int, ...]:
    """Counts, rounded so that the sequence behind each location is a multiple of `align` long.

    Each length is the nearest one that can be reached, and the longer one of two that are as near. Where anything
    leaves, one token leaves at the first place at least, since what ranks was made for it.

    Args:
        num_tokens: patch tokens that are there.
        counts: how many leave at each location; where none leaves, nothing is rounded.
        num_leading: class, register and prompt tokens, which count in the length.
        most: as of `drop_schedule`; it is kept to.

    Raises:
        UserError: the first location cannot reach any multiple.
    """
    if align == 1 or not any(counts):
        return tuple(counts)
    found, wanted = [], num_tokens
    for count in counts:
        wanted -= count
        reachable = range(num_tokens - (not found), max(num_tokens - most(num_tokens), 1) - 1, -1)
        fitting = [kept for kept in reachable if (num_leading + kept) % align == 0]
        if not fitting:
            raise UserError(
                f"align {align} cannot be kept: of {num_leading + num_tokens} tokens in a sequence at most "
                f"{most(num_tokens)} patch tokens can leave at the first location, and no number of them leaves a "
                f"multiple of {align}; try a smaller align"
            )
        kept = min(fitting, key=lambda kept: abs(kept - wanted))
        found.append(num_tokens - kept)
        num_tokens = kept
    return tuple(found)


def clipped(num_tokens: int, counts: Sequence[int], most: Callable[[int], int]) -> tuple[int, ...]:
    """Counts, each lowered to what can leave at once of the tokens that are there (`most`, as of `drop_schedule`)."""
    found = []
    for count in counts:
        found.append(min(count, most(num_tokens)))
        num_tokens -= found[-1]
    return tuple(found)


def budget_schedule(
    budget: float,
    whole: int,
    schedule: Callable[[int], tuple[int, ...]],
    cost: Callable[[tuple[int, ...]], int],
    largest: int,
    align: int = 1,
) -> tuple[int, ...]:
    """The schedule of fewest leaving tokens that stays within a share of a tower's MACs, by less than `align` tokens.

    Args:
        budget: share of `whole`, in (0, 1].
        whole: MACs of the unpruned tower for one image.
        schedule: counts per location where so many tokens are to leave.
        cost: MACs of one image with such counts, ranking and matching included.
        largest: the most that `schedule` is asked for.
        align: what `schedule` rounds the lengths of sequences to.

    Raises:
        UserError: even the most that can leave costs more.
    """
    if (least := cost(schedule(largest))) > budget * whole:
        raise UserError(
            f"budget {budget:g} cannot be kept: with these locations at least {least / whole:.3f} of the tower's MACs "
            f"are left; try earlier locations, or more of them{', or a smaller align' if align > 1 else ''}"
        )
    fits = lambda counts: cost(counts) <= budget * whole  # noqa: E731
    return _given_back(schedule(bisect_left(range(largest + 1), True, key=lambda n: fits(schedule(n)))), fits, align)


def _given_back(counts: tuple[int, ...], fits: Callable[[tuple[int, ...]], bool], step: int) -> tuple[int, ...]:
    """Fewer leaving tokens, as long as they fit: rounding leaves some of a budget over. Earlier places come first.

    So many as `step` are given back at a time, since all lengths behind a place grow by it. One token leaves at the
    first place at least, since what ranks was made for it.
    """
    for place in range(len(counts)):
        while (rest := counts[place] - step) >= (place == 0) and fits(
            fewer := (*counts[:place], rest, *counts[place + 1 :])
        ):
            counts = fewer
    return counts
