"""The plot of a sweep, by what is swept."""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.config import value_at
from patchrank.report.labels import KEEP_RATE, LOCATIONS, labels
from patchrank.report.plots.cloud import draw_cloud
from patchrank.report.plots.curves import draw_curves
from patchrank.report.plots.dots import draw_dots
from patchrank.report.plots.heat import BY_FIT, draw_heat
from patchrank.report.results import Setting

WIDEST_MAP, MOST_LINES, MOST_PLACES = 12, 8, 100
ON_VAL = " On validation images."


def draw_sweep(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """PNG, and a caption."""
    content, caption = _draw(settings, axes)
    return content, caption + ON_VAL * settings[0].on_val


def _draw(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """A map where predictors meet tasks, curves where the keep rate varies, dots elsewhere; a cloud of too many."""
    if BY_FIT in axes and len(set(labels(settings, axes, without=[KEEP_RATE]))) <= WIDEST_MAP:
        return draw_heat(settings, axes)
    if KEEP_RATE in axes and len(set(labels(settings, axes, without=(KEEP_RATE, LOCATIONS)))) <= MOST_LINES:
        return draw_curves(settings, axes)
    rates = {value_at(setting.config, KEEP_RATE) for setting in settings} if KEEP_RATE in axes else {None}
    places = len(set(labels(settings, axes, without=[KEEP_RATE]))) * len(rates)
    return draw_cloud(settings) if places > MOST_PLACES else draw_dots(settings, axes)
