"""The picture of a Pareto front: what is gained against what it costs, a panel for every pair of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from patchrank.config import Constraint, Objective
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


def draw_front(
    front: Front, objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()
) -> tuple[bytes, str]:
    """PNG and caption: a panel for every pair of a value and a cost. Numbers are those of the front's table."""
    from matplotlib.figure import Figure

    values = [each for each in objectives if each.mode == "max"]
    costs = [each for each in objectives if each.mode == "min"]
    if not values or not costs:  # the last stands for a cost
        values, costs = objectives[:-1], objectives[-1:]
    figure = Figure(figsize=(4.6 * len(costs) + 0.4, 3.2 * len(values) + 0.5), layout="constrained")
    panels = figure.subplots(len(values), len(costs), squeeze=False)
    for row, value in zip(panels, values):
        for panel, cost in zip(row, costs):
            _draw(panel, front, value, cost)
            _draw_bounds(panel, constraints, value, cost)
            _write_numbers(panel, front, value, cost)
    add_legend(figure, panels[0][:1], columns=6)
    return png(figure), CAPTION.format(HOLLOW if front.infeasible else "")


def unpruned_figure(rows: Sequence[dict], metric: str) -> float | None:
    """What the unpruned tower has of a metric. Where every trial measured it anew, the median."""
    known = COLUMNS[metric].unpruned
    if not isinstance(known, str):
        return known
    found = [row["metrics"][known] for row in rows if known in row["metrics"]]
    return float(np.median(found)) if found else None


def _draw(panel, front: Front, value: Objective, cost: Objective) -> None:
    faint, hollow = {"alpha": 0.35, "lw": 0}, {"alpha": 0.6, "facecolors": "none", "lw": 0.8}
    strong = {"lw": 0.6, "edgecolors": "black", "zorder": 3}
    for rows, look in ((front.beaten, faint), (front.infeasible, hollow), (front.best + front.equal, strong)):
        for reducer in dict.fromkeys(row["config"]["pruning"]["reducer"] for row in rows):
            _scatter(panel, [row for row in rows if row["config"]["pruning"]["reducer"] == reducer], value, cost, look)
    line = [(row["metrics"][cost.metric], row["metrics"][value.metric]) for row in _best_here(front, value, cost)]
    panel.plot(*zip(*line), color="black", lw=1, zorder=2)
    star = [unpruned_figure(front.best, each.metric) for each in (cost, value)]
    if None not in star:
        panel.plot(*star, "*", color="black", ms=11, ls="", label="unpruned", zorder=4)
    panel.set_xlabel(COLUMNS[cost.metric].head, fontsize=9)
    panel.set_ylabel(COLUMNS[value.metric].head, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(lw=0.4, color="#e5e5e5")
    panel.spines[["top", "right"]].set_visible(False)


def _scatter(panel, rows: Sequence[dict], value: Objective, cost: Objective, look: dict) -> None:
    """Points of one reducer, which colour and mark tell."""
    reducer = rows[0]["config"]["pruning"]["reducer"]
    x, y = ([row["metrics"][each.metric] for row in rows] for each in (cost, value))
    colour = colour_of(reducer)
    mark = "P" if reducer == "random" else MARKERS.get(reducer, "h")
    fill = {"edgecolors": colour} if look.get("facecolors") == "none" else {"facecolors": colour}
    panel.scatter(x, y, s=30, marker=mark, label=RANKINGS.get(reducer, reducer), **(fill | look))


def _best_here(front: Front, value: Objective, cost: Objective) -> list[dict]:
    """The rows of the front that nothing beats in these two objectives alone, by cost."""
    return pareto_front(front.best, [cost, value]).best


def _draw_bounds(panel, constraints: Sequence[Constraint], value: Objective, cost: Objective) -> None:
    for each in constraints:
        bound = each.at_most if each.at_least is None else each.at_least
        for objective, draw in ((cost, panel.axvline), (value, panel.axhline)):
            if objective.metric == each.metric:
                draw(bound, color="#c2410c", lw=1, ls=":")


def _write_numbers(panel, front: Front, value: Objective, cost: Objective) -> None:
    """Numbers of the table beside the points of the line, where there is room."""
    (left, right), (low, high), taken = panel.get_xlim(), panel.get_ylim(), []
    numbers = {row["id"]: n + 1 for n, row in enumerate(front.best)}
    for row in _best_here(front, value, cost):
        x, y = (row["metrics"][each.metric] for each in (cost, value))
        place = (x - left) / (right - left), (y - low) / (high - low)
        if all(any(abs(a - b) > near for a, b, near in zip(place, other, NEAR)) for other in taken):
            taken.append(place)
            panel.annotate(str(numbers[row["id"]]), (x, y), (4, -9), textcoords="offset points", fontsize=8, zorder=5)
