"""Change against the unpruned tower as dots with intervals: a panel for each task, a row for each setting.

Where the keep rate is swept too, a row holds a dot for each rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from patchrank.config import value_at
from patchrank.report.labels import KEEP_RATE, labels, plain, swept_rates
from patchrank.report.markdown import signed
from patchrank.report.plots.style import PALETTE, add_legend, colour_of, log_note, png, scale_points, wrap
from patchrank.report.results import Setting, all_tasks, change, subset
from patchrank.utils.stats import Interval

CAPTION = "Change of accuracy against the unpruned tower, in points, with 95 % intervals{}{}."
ORACLES = "; hollow: oracles, on the first {} images of each task alone"


class Dot(NamedTuple):
    """The change of one setting on one task; `place` counts rows from the top."""

    place: float
    setting: Setting
    found: Interval


def draw_dots(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """PNG and caption."""
    names, tasks = labels(settings, axes, without=[KEEP_RATE]), all_tasks(settings)
    rates = swept_rates(settings, axes)[::-1]
    rows, tasks = list(dict.fromkeys(names)), [*tasks, None] if len(tasks) > 1 else tasks
    places = [rows.index(name) + _shift(setting, rates) for name, setting in zip(names, settings)]
    per_task = [
        [Dot(place, each, change(each, task)) for place, each in zip(places, settings) if task in (None, *each.tasks)]
        for task in tasks
    ]
    span = np.array([dot.found.ends for dots in per_task for dot in dots])
    figure, panels = _frame(rows, tasks, len(rates))
    for panel, dots in zip(panels, per_task):
        _draw(panel, dots, rates)
        scale_points(panel, "x", span)
    if rates:
        add_legend(figure, panels[:1], columns=5)
    few = subset(settings)
    return png(figure), CAPTION.format(log_note(span), ORACLES.format(few) if few else "")


def _frame(rows: Sequence[str], tasks: Sequence[str | None], dots: int) -> tuple:
    """A figure with empty panels, as tall as its rows with so many dots each need."""
    from matplotlib.figure import Figure

    texts = [wrap(row, 30) for row in rows]
    height = (0.24 + 0.12 * max(1, dots)) * len(rows) + 0.1 * "".join(texts).count("\n") + 0.9
    figure = Figure(figsize=(2.1 * max(2, len(tasks)) + 2.0, height), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for panel, task in zip(panels, tasks):
        panel.set_title(task or "mean", fontsize=10)
        panel.set_xlabel("points", fontsize=9)
    panels[0].set_yticks(range(len(rows)), texts, fontsize=9)
    panels[0].set_ylim(len(rows) - 0.4, -0.7)
    return figure, panels


def _shift(setting: Setting, rates: Sequence[float]) -> float:
    """How far below the middle of its row a rate's dot stands."""
    if not rates:
        return 0.0
    return 0.7 * ((rates.index(value_at(setting.config, KEEP_RATE)) + 0.5) / len(rates) - 0.5)


def _draw(panel, dots: Sequence[Dot], rates: Sequence[float]) -> None:
    panel.axvline(0, color="black", lw=0.9, ls=(0, (4, 3)), zorder=1)
    for place, setting, found in dots:
        colour, label = _colour(setting, rates)
        low, high = found.ends
        bars = [[found.estimate - low], [high - found.estimate]]
        look = {"fmt": "o", "ms": 4 if rates else 5, "lw": 1.3, "color": colour, "label": label, "zorder": 3}
        face = "white" if setting.is_oracle else colour
        panel.errorbar([found.estimate], [place], xerr=bars, markerfacecolor=face, **look)
        if not rates:  # there is room for the number
            box = {"facecolor": "white", "lw": 0, "pad": 0.6, "alpha": 0.8}
            at = {"xytext": (0, 5.5), "textcoords": "offset points", "ha": "center"}
            text = signed(found.estimate, 1)
            panel.annotate(text, (found.estimate, place), fontsize=7, color=colour, bbox=box, **at)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", lw=0.4, color="#dddddd")
    panel.spines[["top", "right", "left"]].set_visible(False)


def _colour(setting: Setting, rates: Sequence[float]) -> tuple[str, str | None]:
    """Colour and legend: by keep rate where that is swept, else by ranking, which the row names."""
    if not rates:
        return colour_of(setting.config["pruning"]["reducer"]), None
    rate = value_at(setting.config, KEEP_RATE)
    return PALETTE[rates.index(rate) % len(PALETTE)], f"{plain(rate, KEEP_RATE)} kept"
