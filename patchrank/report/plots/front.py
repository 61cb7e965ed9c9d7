"""The picture of a Pareto front: what is gained against what it costs, a panel for every pair of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from patchrank.config import Objective
from patchrank.report.labels import RANKINGS
from patchrank.report.pareto import Front, pareto_front
from patchrank.report.plots.style import MARKERS, add_legend, colour_of, png


class Column(NamedTuple):
    """A metric's head, how its figures are written, and the unpruned tower's: a metric of trials, or a value."""

    head: str
    layout: str
    unpruned: str | float | None


COLUMNS = {
    "val_accuracy": Column("accuracy, val", ".1f", "val_accuracy_unpruned"),
    "val_agreement": Column("agreement, val", ".1f", 100.0),
    "val_cosine": Column("cosine, val", ".4f", 1.0),
    "matching_rate": Column("matching, val", ".1f", None),
    "gmacs": Column("GMACs", ".4f", "gmacs_unpruned"),
    "ms": Column("ms", ".3f", "ms_unpruned"),
    "speedup": Column("speed-up", ".2f", 1.0),
}
CAPTION = (
    "Every trial by what it is worth and what it costs; strong: the front, numbered as in the table; line: those of it "
    "that nothing beats in this panel's two figures alone; star: the unpruned tower{}."
)
HOLLOW = "; hollow: trials that break a constraint (dotted)"
NEAR = (0.035, 0.06)  # shares of a panel's width and height within which a second number would cover the first


def draw_front(front: Front) -> tuple[bytes, str]:
    """PNG and caption: a panel for every pair of a value and a cost. Numbers are those of the front's table."""
    from matplotlib.figure import Figure

    values = [each for each in front.objectives if each.mode == "max"]
    costs = [each for each in front.objectives if each.mode == "min"]
    if not values or not costs:  # the last stands for a cost
        values, costs = front.objectives[:-1], front.objectives[-1:]
    figure = Figure(figsize=(4.6 * len(costs) + 0.4, 3.2 * len(values) + 0.5), layout="constrained")
    panels = figure.subplots(len(values), len(costs), squeeze=False)
    for row, value in zip(panels, values):
        for panel, cost in zip(row, costs):
            _draw(panel, front, cost, value)
    add_legend(figure, panels[0][:1], columns=6)
    return png(figure), CAPTION.format(HOLLOW if front.infeasible else "")


def unpruned_figure(rows: Sequence[dict], metric: str) -> float | None:
    """What the unpruned tower has of a metric. Where every trial measured it anew, the median."""
    known = COLUMNS[metric].unpruned
    if not isinstance(known, str):
        return known
    found = [row["metrics"][known] for row in rows if known in row["metrics"]]
    return float(np.median(found)) if found else None


def _draw(panel, front: Front, cost: Objective, value: Objective) -> None:
    """All trials, those of the front that nothing beats in these two alone, the unpruned tower, and bounds."""
    _scatter(panel, front, cost, value)
    best = pareto_front(front.best, [cost, value]).best
    line = [(row["metrics"][cost.metric], row["metrics"][value.metric]) for row in best]
    panel.plot(*zip(*line), color="black", lw=1, zorder=2)
    star = [unpruned_figure(front.best, each.metric) for each in (cost, value)]
    if None not in star:
        panel.plot(*star, "*", color="black", ms=11, ls="", label="unpruned", zorder=4)
    panel.set_xlabel(COLUMNS[cost.metric].head, fontsize=9)
    panel.set_ylabel(COLUMNS[value.metric].head, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(lw=0.4, color="#e5e5e5")
    panel.spines[["top", "right"]].set_visible(False)
    for each in front.constraints:
        for objective, draw in ((cost, panel.axvline), (value, panel.axhline)):
            if objective.metric == each.metric:
                draw(each.at_most if each.at_least is None else each.at_least, color="#c2410c", lw=1, ls=":")
    numbers = {row["id"]: n + 1 for n, row in enumerate(front.best)}
    _write_numbers(panel, [numbers[row["id"]] for row in best], line)


def _scatter(panel, front: Front, cost: Objective, value: Objective) -> None:
    """A point of every trial. Its colour and mark tell the reducer, its strength what became of it."""
    faint, hollow = {"alpha": 0.35, "lw": 0}, {"alpha": 0.6, "facecolors": "none", "lw": 0.8}
    strong = {"lw": 0.6, "edgecolors": "black", "zorder": 3}
    for rows, look in ((front.beaten, faint), (front.infeasible, hollow), (front.best + front.equal, strong)):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            point = row["metrics"][cost.metric], row["metrics"][value.metric]
            points.setdefault(row["config"]["pruning"]["reducer"], []).append(point)
        for reducer, places in points.items():
            colour = colour_of(reducer)
            mark = "P" if reducer == "random" else MARKERS.get(reducer, "h")
            fill = {"edgecolors": colour} if look is hollow else {"facecolors": colour}
            panel.scatter(*zip(*places), s=30, marker=mark, label=RANKINGS.get(reducer, reducer), **(fill | look))


def _write_numbers(panel, numbers: Sequence[int], line: Sequence[tuple[float, float]]) -> None:
    """Numbers of the table beside the points of the line, where there is room."""
    (left, right), (low, high), taken = panel.get_xlim(), panel.get_ylim(), []
    for number, (x, y) in zip(numbers, line):
        place = (x - left) / (right - left), (y - low) / (high - low)
        if all(any(abs(a - b) > near for a, b, near in zip(place, other, NEAR)) for other in taken):
            taken.append(place)
            panel.annotate(str(number), (x, y), (4, -9), textcoords="offset points", fontsize=8, zorder=5)
