"""The plot of a sweep, by what is swept."""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.report.curves import draw_curves
from patchrank.report.dots import draw_dots
from patchrank.report.heat import BY_FIT, draw_heat
from patchrank.report.names import KEEP_RATE, LOCATIONS, labels
from patchrank.report.results import Setting

WIDEST_MAP, MOST_LINES = 12, 8


def draw_sweep(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """A map where predictors meet tasks, curves where the keep rate varies, dots elsewhere: PNG, and a caption."""
    if BY_FIT in axes and len(set(labels(settings, axes, without=[KEEP_RATE]))) <= WIDEST_MAP:
        return draw_heat(settings, axes)
    if KEEP_RATE in axes and len(set(labels(settings, axes, without=(KEEP_RATE, LOCATIONS)))) <= MOST_LINES:
        return draw_curves(settings, axes)
    return draw_dots(settings, axes)
