"""Sheets of ruled paper and ink to write on them: the style of `digits_ink`, which no pre-training image has."""

from __future__ import annotations

import numpy as np
from PIL import Image

FIBRE = 0.08  # standard deviation of the paper's texture, in grey levels from 0 to 1
RULING = 0.25  # how much darker ruled lines are
CONTRAST = (0.3, 0.7)  # of ink against paper; photographs' digits have 0.35 and more in luminance


def ruled_sheet(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A sheet (size, size, 3) in [0, 1], lined or squared, with fibres and stains; and an ink for it, (3,)."""
    paper = np.array([0.95, 0.91, 0.82], np.float32) * rng.uniform(0.8, 1.0)
    texture = sum(weight * _noise(rng, cells, size) for cells, weight in ((9, 1.0), (24, 0.7), (64, 0.7)))
    lines = RULING * _ruling(rng, size)[..., None] * np.array([1.0, 0.7, 0.3], np.float32)
    ink = paper * (1 - rng.uniform(*CONTRAST)) * np.array([0.8, 0.85, 1.1], np.float32)
    return paper + FIBRE * texture[..., None] - lines, ink.astype(np.float32)


def _noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    noise = rng.normal(size=(cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.BICUBIC))


def _ruling(rng: np.random.Generator, size: int) -> np.ndarray:
    """1 on ruled lines, 0 elsewhere: horizontal ones 7 to 12 pixels apart, on every second sheet vertical ones too."""
    step = int(rng.integers(7, 13))
    top, left = rng.integers(step, size=2)
    lines = np.zeros((size, size), np.float32)
    lines[top::step] = 1
    if rng.random() < 0.5:
        lines[:, left::step] = 1
    return lines
