"""Figures of merit, on plain arrays; shares are percentages from 0 to 100."""

from __future__ import annotations

import numpy as np


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
    both = top_mask(np.broadcast_to(predicted, golden.shape), k) & top_mask(golden, k)
    return float(100 * both.sum(-1).mean() / k)


def position_prior(golden: np.ndarray) -> np.ndarray:
    """The mean golden map (N,) of training images (B, N): what position alone knows about importance."""
    return golden.mean(0)


def percent(right: np.ndarray) -> float:
    """Share of true entries."""
    return float(100 * np.mean(right))
