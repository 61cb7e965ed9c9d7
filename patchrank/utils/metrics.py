"""How well one ranking of tokens agrees with another, on plain arrays. Shares are percentages from 0 to 100."""

from __future__ import annotations

import numpy as np


def top_k(num_tokens: int) -> int:
    """The k of matching rate@k: 100 of CLIP B/16's 196 tokens, and the same share of other towers' tokens."""
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
        k: `top_k(N)` if left out.
    """
    k = k or top_k(golden.shape[-1])
    return float(100 * _hits(predicted, golden, k).mean() / k)


def matching_each(predicted: np.ndarray, golden: np.ndarray, k: int | None = None) -> np.ndarray:
    """`matching_rate` of every image (B,)."""
    k = k or top_k(golden.shape[-1])
    return 100 * _hits(predicted, golden, k) / k


def _hits(predicted: np.ndarray, golden: np.ndarray, k: int) -> np.ndarray:
    """How many of the golden ranking's top k tokens the predicted ranking finds in each image (B,)."""
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


def percent(right: np.ndarray) -> float:
    """Share of true entries."""
    return float(100 * np.mean(right))
