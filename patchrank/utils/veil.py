"""What became of patches, shown on the image itself, as reports and `patchrank.visualize` draw it."""

from __future__ import annotations

import numpy as np

DROPPED, VEIL = 128, 0.85  # the grey level of the veil, and how much of a patch it covers
BORDER = 0.5  # how much of what is below it the line between two regions covers
BRIGHT = 170  # grey level from which on that line is black, and not white
MERGED = "patches that merged show the mean colour of all that one token stands for, with a line around them"


def draw_left(pictures: np.ndarray, kept: np.ndarray, source: np.ndarray | None, grid: np.ndarray) -> np.ndarray:
    """Images (n, S, S, 3) on which every patch shows what became of it.

    A patch that was kept stands as it is, one that was dropped is veiled. Patches that one token stands for are a
    region: it is filled with its mean colour, and a line runs around it.

    Args:
        kept: (n, K), places of the kept patches.
        source: (n, N), which of the kept each patch lives in, -1 where it was dropped; None where nothing merged.
        grid: (2,), rows and columns.
    """
    if source is None:
        return veil_dropped(pictures, kept, grid)
    rows, columns = (int(side) for side in grid)
    return np.stack([_fill_regions(*each) for each in zip(pictures, source.reshape(-1, rows, columns))])


def veil_dropped(pictures: np.ndarray, kept: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Images (n, S, S, 3) on which grey veils every patch that is not among the kept places (n, K) of a `grid` (2,)."""
    grid = np.asarray(grid)
    veil = np.full((len(pictures), grid.prod()), VEIL)
    np.put_along_axis(veil, kept, 0.0, axis=1)
    scale = pictures.shape[1] // grid[0], pictures.shape[2] // grid[1]
    veil = veil.reshape(-1, *grid).repeat(scale[0], axis=1).repeat(scale[1], axis=2)[..., None]
    return (pictures * (1 - veil) + DROPPED * veil).astype(np.uint8)


def _fill_regions(picture: np.ndarray, source: np.ndarray) -> np.ndarray:
    """One image (S, S, 3) with its regions, by a source map (rows, columns)."""
    height, width = (side // count for side, count in zip(picture.shape, source.shape))
    homes = source.repeat(height, axis=0).repeat(width, axis=1)  # of each pixel
    slots = homes + 1  # 0 for what was dropped
    counts = np.bincount(slots.ravel())
    sums = [np.bincount(slots.ravel(), weights=picture[..., channel].ravel()) for channel in range(3)]
    means = np.stack(sums, axis=-1) / counts.clip(min=1)[:, None]
    merged = (homes >= 0) & (counts[slots] > height * width)
    drawn = np.where(merged[..., None], means[slots], picture)
    drawn = np.where(homes[..., None] < 0, picture * (1 - VEIL) + DROPPED * VEIL, drawn)
    ink = np.where(drawn.mean(-1, keepdims=True) < BRIGHT, 255, 0)
    share = BORDER * _borders(homes, merged)[..., None]
    return (drawn * (1 - share) + ink * share).astype(np.uint8)


def _borders(homes: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """The pixels (S, S) whose right or lower neighbour lives elsewhere, where either lives in a merged token."""
    line = np.zeros_like(merged)
    line[:, :-1] |= (homes[:, :-1] != homes[:, 1:]) & (merged[:, :-1] | merged[:, 1:])
    line[:-1] |= (homes[:-1] != homes[1:]) & (merged[:-1] | merged[1:])
    return line
