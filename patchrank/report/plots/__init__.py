"""The plot of a sweep, by what is swept."""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.report.labels import KEEP_RATE, LOCATIONS, labels, swept_rates
from patchrank.report.plots.curves import draw_curves
from patchrank.report.plots.dots import draw_dots
from patchrank.report.results import Setting

FEWEST_RATES, MOST_LINES = 3, 8  # of curves
MOST_DOTS = 100  # of one panel


def draw_sweep(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """PNG and caption: curves over the keep rates where lines are few, otherwise a row of dots for each setting."""
    draw = draw_curves if _has_curves(settings, axes) else draw_dots
    picture, caption = draw(settings, axes)
    return picture, f"{caption} On validation images." if settings[0].on_val else caption


def is_crowded(settings: Sequence[Setting], axes: Sequence[str]) -> bool:
    """Whether settings are too many for curves and for rows, as where a sampler draws them."""
    rows = set(labels(settings, axes, without=[KEEP_RATE]))
    return not _has_curves(settings, axes) and len(rows) * max(1, len(swept_rates(settings, axes))) > MOST_DOTS


def _has_curves(settings: Sequence[Setting], axes: Sequence[str]) -> bool:
    lines = set(labels(settings, axes, without=[KEEP_RATE, LOCATIONS]))
    return len(swept_rates(settings, axes)) >= FEWEST_RATES and len(lines) <= MOST_LINES
