"""Paired statistics: bootstrap over clusters of images, and a correction for how many comparisons are judged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from patchrank.utils.errors import UserError


class Interval(NamedTuple):
    """A mean difference, its interval, the two-sided p that it is 0, and how many images and clusters are behind it.

    low, high and p are NaN where all images are of one cluster, since nothing tells how other clusters would differ.
    """

    estimate: float
    low: float
    high: float
    p: float
    n: int
    clusters: int

    @property
    def is_known(self) -> bool:
        """Whether there is an interval at all."""
        return self.clusters > 1

    @property
    def ends(self) -> tuple[float, float]:
        """Where its bars end in a picture; at the estimate where there is no interval."""
        return (self.low, self.high) if self.is_known else (self.estimate, self.estimate)

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def cluster_bootstrap(values: np.ndarray, clusters: np.ndarray, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """Means (draws,) of samples that draw whole clusters with replacement.

    Images of one cluster (scenes of one digit, clips of one video) tend to be right or wrong together. Drawing them
    singly would give intervals that are too narrow. A sample's mean is that of all its images, so a larger cluster
    weighs more, as it does in the plain mean. With fewer than about 20 clusters intervals are somewhat too narrow.

    Args:
        values: (n,).
        clusters: (n,), equal for values that belong together.
        draws: the smallest p is 2 / draws; the default leaves room for Holm's factor over a hundred comparisons.

    Raises:
        UserError: fewer than 2 clusters, which have no spread.
    """
    names, member = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        raise UserError(f"an interval needs at least 2 clusters, but there are {len(names)}")
    weights = _weights(len(names), draws, seed)
    return (weights @ np.bincount(member, values)) / (weights @ np.bincount(member))


@lru_cache(maxsize=2)  # tens of MB each, and most comparisons of a report are on the same images
def _weights(clusters: int, draws: int, seed: int) -> np.ndarray:
    """How often every sample (rows) draws every cluster (columns)."""
    chances = np.full(clusters, 1 / clusters)
    weights = np.random.default_rng(seed).multinomial(clusters, chances, size=draws).astype(float)
    weights.flags.writeable = False
    return weights


def paired_interval(
    a: np.ndarray, b: np.ndarray | float, clusters: np.ndarray, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile interval of the mean of a - b, pairs of one image each, by `cluster_bootstrap`.

    p is twice the smaller share of samples on either side of 0, the data counted as one of them, so that it is never 0.
    Where all differences are equal the interval is a point: it knows nothing of what did not occur. Of one cluster
    alone there is the mean, but no interval.

    Args:
        a, b: (n,), one number an image in the same order; `b` may be one number.
    """
    differences = np.asarray(a, float) - b
    count, estimate = len(np.unique(clusters)), float(differences.mean().round(12))
    if count < 2:
        return Interval(estimate, np.nan, np.nan, np.nan, len(differences), count)
    # sums in another order differ in the last bits, which must not lift a bound of 0 above 0
    means = cluster_bootstrap(differences, clusters, draws, seed).round(12)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).round(12)
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (draws + 1))
    return Interval(estimate, float(low), float(high), p, len(differences), count)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p values in the order given: below 0.05, they stand although so many were looked at."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation over seeds; NaN for one, which tells nothing of the others."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
