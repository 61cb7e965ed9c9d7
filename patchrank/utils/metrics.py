"""Figures of merit and what is certain of them, on plain arrays; shares are percentages from 0 to 100."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from patchrank.utils.errors import UserError


def top_k(num_tokens: int) -> int:
    """The k of matching rate@k: 100 of CLIP B/16's 196 tokens, and the same share elsewhere."""
    return int(0.51 * num_tokens + 0.5)


def top_mask(scores: np.ndarray, k: int) -> np.ndarray:
    """Which tokens are among the k highest scores (..., N), as booleans; among ties the lower index wins."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order[..., :k], True, axis=-1)
    return mask


def matching_rate(predicted: np.ndarray, golden: np.ndarray, k: int | None = None) -> float:
    """Share of the golden ranking's top k tokens that the predicted ranking has in its top k (table 1, column 8).

    Args:
        predicted, golden: scores (B, N); `predicted` may be (N,), one ranking for all images.
    """
    k = k or top_k(golden.shape[-1])
    return float(100 * _hits(predicted, golden, k).mean() / k)


def matching_each(predicted: np.ndarray, golden: np.ndarray, k: int | None = None) -> np.ndarray:
    """`matching_rate` of every image (B,)."""
    k = k or top_k(golden.shape[-1])
    return 100 * _hits(predicted, golden, k) / k


def _hits(predicted: np.ndarray, golden: np.ndarray, k: int) -> np.ndarray:
    return (top_mask(np.broadcast_to(predicted, golden.shape), k) & top_mask(golden, k)).sum(-1)


def kendall(predicted: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of every image (B,), from -1 to 1: pairs in the right order less pairs in the wrong one.

    Scores that are all equal order nothing: 0.

    Args:
        predicted, golden: scores (B, N); `predicted` may be (N,), one ranking for all images.
    """
    from scipy.stats import kendalltau  # scikit-learn brings it; it loads slowly

    pairs = zip(np.broadcast_to(predicted, golden.shape), golden)
    return np.nan_to_num([kendalltau(ours, right, method="asymptotic").statistic for ours, right in pairs])


def ndcg(predicted: np.ndarray, golden: np.ndarray, k: int | None = None) -> np.ndarray:
    """Normalised discounted cumulative gain of the first k tokens of every image (B,), from 0 to 1.

    A token's gain is linear in its golden rank: N - 1 for the most important, 0 for the least; place i from 1 is
    discounted by log2(i + 1). Equal predicted scores share the mean gain of their places.

    Args:
        predicted, golden: scores (B, N); `predicted` may be (N,), one ranking for all images.
        k: `top_k(N)` if left out.
    """
    from sklearn.metrics import ndcg_score  # it loads slowly

    k, last = k or top_k(golden.shape[-1]), golden.shape[-1] - 1
    gains = last - np.argsort(np.argsort(-golden, axis=-1, kind="stable"), axis=-1)
    pairs = zip(gains, np.broadcast_to(predicted, golden.shape))
    return np.asarray([ndcg_score(gain[None], ours[None], k=k) for gain, ours in pairs])


def position_prior(golden: np.ndarray) -> np.ndarray:
    """The mean golden map (N,) of training images (B, N): what position alone knows about importance."""
    return golden.mean(0)


def percent(right: np.ndarray) -> float:
    """Share of true entries."""
    return float(100 * np.mean(right))


class Interval(NamedTuple):
    """A mean difference, its interval, the two-sided p that it is 0, and the images and clusters behind them.

    low, high and p are NaN where all images are of one cluster: nothing then tells how others would differ.
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
        UserError: fewer than 2 clusters, whose spread nothing tells.
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
    a: np.ndarray,
    b: np.ndarray | float,
    clusters: np.ndarray,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
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
