"""Predictors fitted on some tasks and tested on others: a map of changes for each keep rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchrank.config import value_at
from patchrank.report.compare import all_tasks, change, change_on
from patchrank.report.labels import KEEP_RATE, labels, plain
from patchrank.report.plots.style import png, wrap
from patchrank.report.results import Setting
from patchrank.utils.stats import Interval

BY_FIT = "predictor.fit_on"
CAPTION = (
    "Change of accuracy against the unpruned tower, in points; bold where the 95 % interval excludes 0. Columns: what "
    "the predictor was fitted on; rows: what it was tested on."
)


def draw_heat(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """PNG and caption."""
    names = [_name(label) for label in labels(settings, axes, without=[KEEP_RATE])]
    columns, tasks = list(dict.fromkeys(names)), all_tasks(settings)
    rows = [*tasks, None] if len(tasks) > 1 else tasks
    rates = list(dict.fromkeys(value_at(setting.config, KEEP_RATE) for setting in settings))
    figure, panels = _frame(columns, rows, rates)
    for panel, rate in zip(panels, rates):
        here = {name: each for name, each in zip(names, settings) if value_at(each.config, KEEP_RATE) == rate}
        cells = [[change_on(here[name], task) if name in here else None for name in columns] for task in rows]
        image = _draw(panel, cells, _limit(settings))
    bar = figure.colorbar(image, ax=list(panels), shrink=0.9, aspect=30)
    bar.set_label("points", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return png(figure), CAPTION


def _frame(columns: Sequence[str], rows: Sequence[str | None], rates: Sequence[float]) -> tuple:
    """A figure with an empty panel for each keep rate."""
    from matplotlib.figure import Figure

    height = (0.42 * len(rows) + 0.3) * len(rates) + 0.17 * max(name.count("\n") + 1 for name in columns) + 0.4
    figure = Figure(figsize=(0.95 * len(columns) + 2.2, height), layout="constrained")
    panels = figure.subplots(len(rates), 1, squeeze=False, sharex=True)[:, 0]
    for panel, rate in zip(panels, rates):
        panel.set_yticks(range(len(rows)), [row or "mean" for row in rows], fontsize=9)
        panel.set_title(f"{plain(rate, KEEP_RATE)} kept", fontsize=9)
    panels[-1].set_xticks(range(len(columns)), columns, fontsize=8)
    return figure, panels


def _name(label: str) -> str:
    """On narrow lines; what is fitted is a predictor."""
    return wrap(label.removeprefix("predictor; "), 14)


def _limit(settings: Sequence[Setting]) -> float:
    """The scale's end: predictors fill it, what is ranked otherwise may saturate."""
    fitted = [setting for setting in settings if setting.config["pruning"]["reducer"] == "predictor"] or settings
    return max(0.5, *(abs(change(setting, task).estimate) for setting in fitted for task in setting.tasks))


def _draw(panel, changes: Sequence[Sequence[Interval | None]], limit: float):
    """Colours and numbers of one map; white where nothing was measured."""
    values = np.array([[np.nan if found is None else found.estimate for found in row] for row in changes])
    image = panel.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for row, column in np.ndindex(values.shape):
        found = changes[row][column]
        if found is not None:
            colour = "white" if abs(found.estimate) > 0.6 * limit else "black"
            weight = "bold" if found.excludes_zero else "normal"
            text = f"{round(found.estimate, 1) + 0.0:+.1f}"
            panel.text(column, row, text, ha="center", va="center", fontsize=9, color=colour, weight=weight)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return image
