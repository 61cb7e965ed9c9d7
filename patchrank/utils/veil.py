"""Which patches survive, shown on the image itself, as reports and `patchrank.visualize` draw it."""

from __future__ import annotations

import numpy as np

DROPPED, VEIL = 128, 0.85  # the grey level of the veil, and how much of a patch it covers


def veil_dropped(pictures: np.ndarray, kept: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Images (n, S, S, 3) on which grey veils every patch that is not among the kept places (n, K) of a `grid` (2,)."""
    grid = np.asarray(grid)
    veil = np.full((len(pictures), grid.prod()), VEIL)
    np.put_along_axis(veil, kept, 0.0, axis=1)
    scale = pictures.shape[1] // grid[0], pictures.shape[2] // grid[1]
    veil = veil.reshape(-1, *grid).repeat(scale[0], axis=1).repeat(scale[1], axis=2)[..., None]
    return (pictures * (1 - veil) + DROPPED * veil).astype(np.uint8)
