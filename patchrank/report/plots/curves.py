"""Change of accuracy against keep rate: a panel for each task and, where they are swept, each set of locations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np

from patchrank.config import value_at
from patchrank.report.labels import KEEP_RATE, LOCATIONS, labels, layers, plain, ranking, swept_rates
from patchrank.report.plots.style import MARKERS, PALETTE, add_legend, colour_of, log_note, png, scale_points
from patchrank.report.results import Setting, all_tasks, change, mean, subset

CAPTION = (
    "Change of accuracy against the unpruned tower (dashed line), in points, by share of patch tokens kept; bands are "
    "95 % intervals{}.{}"
)
ORACLES = " Oracles (golden, dashed lines): on the first {} images of each task alone."


class Line(NamedTuple):
    """How a line is drawn, by keywords of `plot`, and the settings that are its points."""

    look: dict
    points: list[Setting]


def draw_curves(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """PNG and caption; one line for every combination of what else is swept."""
    from matplotlib.figure import Figure

    lines, rows, tasks = curve_lines(settings, axes), _rows(settings, axes), all_tasks(settings)
    rates = [100 * rate for rate in swept_rates(settings, axes)]  # of all panels
    legend_rows = -(-len(lines) // 3)
    height = (2.6 if len(rows) > 1 else 2.5) * len(rows) + 0.35 + 0.22 * legend_rows
    figure = Figure(figsize=(3.3 * max(2, len(tasks)), height), layout="constrained")
    panels, spans = figure.subplots(len(rows), len(tasks), squeeze=False, sharex=True), []
    for (where, members), row in zip(rows.items(), panels):
        for task, panel in zip(tasks, row):
            here = [Line(line.look, _among(line.points, members, task)) for line in lines]
            spans.append(draw_panel(panel, here, task, rates))
            panel.set_title(f"{_unpruned(members, task)}{where}", fontsize=9)
    for panel in panels[:, 0]:
        panel.set_ylabel("change of accuracy, points", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("patch tokens kept, %", fontsize=9)
    add_legend(figure, panels.flat, columns=3)
    few = subset(settings)
    return png(figure), CAPTION.format(log_note(*spans), ORACLES.format(few) if few else "")


def curve_lines(settings: Sequence[Setting], axes: Sequence[str]) -> list[Line]:
    """The lines of a picture and how each looks.

    Each reducer has its own colour and mark. Where a reducer has several lines (with prompts, by other scores), those
    of one name beside the reducer's get a colour of the palette, and marks alone tell the reducers apart.
    """
    groups: dict[str, list[Setting]] = {}
    for name, setting in zip(labels(settings, axes, without=[KEEP_RATE, LOCATIONS]), settings):
        groups.setdefault(name, []).append(setting)
    reducers = {name: points[0].config["pruning"]["reducer"] for name, points in groups.items()}
    others = dict.fromkeys(groups, "")
    if len(set(reducers.values())) < len(groups):
        others = {name: name.removeprefix(ranking(points[0])).removeprefix("; ") for name, points in groups.items()}
    taken = [colour_of(reducers[name]) for name, other in others.items() if not other]
    palette = cycle([colour for colour in PALETTE if colour not in taken])
    colours = {other: next(palette) for other in dict.fromkeys(others.values()) if other}
    lines = []
    for name, reducer in reducers.items():
        colour = colours.get(others[name], colour_of(reducer))
        style = {"golden": "--", "random": ":"}.get(reducer, "-")
        look = {"color": colour, "ls": style, "marker": MARKERS.get(reducer, "P"), "label": name}
        lines.append(Line(look, groups[name]))
    return lines


def _rows(settings: Sequence[Setting], axes: Sequence[str]) -> dict[str, list[Setting]]:
    """Settings by their locations, in the order of the sweep; all under "" where these are not swept."""
    rows: dict[str, list[Setting]] = {}
    for setting in settings:
        where = f"\n{layers(plain(value_at(setting.config, LOCATIONS)))}" if LOCATIONS in axes else ""
        rows.setdefault(where, []).append(setting)
    return rows


def _among(points: Sequence[Setting], members: Sequence[Setting], task: str) -> list[Setting]:
    """A line's points in one panel, by keep rate."""
    found = [point for point in points if task in point.tasks and any(point is member for member in members)]
    return sorted(found, key=lambda setting: value_at(setting.config, KEEP_RATE))


def _unpruned(members: Sequence[Setting], task: str) -> str:
    """A task and what the unpruned tower reaches on it, on all images where any setting has them."""
    having = [setting for setting in members if task in setting.tasks]
    if not having:
        return task
    reference = min(having, key=lambda setting: setting.is_oracle)
    return f"{task}, unpruned {mean(reference, 'unpruned', task):.1f} %"


def draw_panel(panel, lines: Sequence[Line], task: str, rates: Sequence[float]) -> np.ndarray:
    """Draws the lines of one panel with their bands, and returns all that they span, in points.

    Args:
        rates: percentages that its axis shows.
    """
    panel.axhline(0, color="black", lw=0.9, ls=(0, (4, 3)), label="unpruned", zorder=1)
    spans = [np.zeros(1)]
    for look, points in lines:
        if not points:
            continue
        changes = [change(point, task) for point in points]
        middle, low, high = np.array([(found.estimate, *found.ends) for found in changes]).T
        at = [100 * value_at(point.config, KEEP_RATE) for point in points]
        panel.fill_between(at, low, high, color=look["color"], alpha=0.12, lw=0)
        panel.plot(at, middle, lw=1.5, ms=4, markerfacecolor="white" if look["ls"] == "--" else None, **look)
        spans += [low, high]
    span = np.concatenate(spans)
    scale_points(panel, "y", span)
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
    panel.set_xlim(max(rates) + 3, min(rates) - 3)  # the more is dropped, the further right
    panel.grid(axis="y", lw=0.4, color="#dddddd")
    panel.spines[["top", "right"]].set_visible(False)
    return span
