"""Which trials are on the Pareto front, and the front as a part of a page: a sentence, a table, a picture.

On the front is a trial that no other beats in one objective without losing in another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from patchrank.config import Constraint, Objective
from patchrank.report.labels import RANKINGS, swept
from patchrank.report.markdown import table
from patchrank.report.plots.style import MARKERS, add_legend, colour_of, png
from patchrank.report.results import Setting

ALWAYS = ("val_accuracy", "val_knn_accuracy", "val_cosine", "gmacs", "ms", "speedup")  # columns, where any row has them


class Column(NamedTuple):
    """A metric's head, how its figures are written, and the unpruned tower's: a metric of trials, or a value."""

    head: str
    layout: str
    unpruned: str | float | None


COLUMNS = {
    "val_accuracy": Column("accuracy, val", ".1f", "val_accuracy_unpruned"),
    "val_agreement": Column("agreement, val", ".1f", 100.0),
    "val_knn_accuracy": Column("k-NN accuracy, val", ".1f", "val_knn_accuracy_unpruned"),
    "val_knn_agreement": Column("k-NN agreement, val", ".1f", 100.0),
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


@dataclass(frozen=True)
class Front:
    """Rows by what became of them.

    best: the front, by cost. equal: rows with exactly the objectives of one in it. beaten: all others that keep the
    constraints. infeasible: rows that break one. incomplete: rows that lack a figure.
    """

    objectives: Sequence[Objective]
    constraints: Sequence[Constraint]
    best: list[dict] = field(default_factory=list)
    equal: list[dict] = field(default_factory=list)
    beaten: list[dict] = field(default_factory=list)
    infeasible: list[dict] = field(default_factory=list)
    incomplete: list[dict] = field(default_factory=list)


def pareto_front(
    rows: Sequence[dict], objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()
) -> Front:
    """The front of some rows. Those that break a constraint are out of it first. The order of the rows changes nothing.

    Figures are compared exactly, never rounded. Of rows with equal objectives the one of the lowest id stands for all.
    """
    front, complete, kept = Front(objectives, constraints), [], []
    for row in rows:
        is_complete = all(is_number(row["metrics"].get(each.metric)) for each in (*objectives, *constraints))
        (complete if is_complete else front.incomplete).append(row)
    costs_first = sorted(objectives, key=lambda each: each.mode == "max")
    complete.sort(key=lambda row: (_losses(row, costs_first), row["id"]))
    for row in complete:
        is_kept = all(each.excess(row["metrics"]) <= 0 for each in constraints)
        (kept if is_kept else front.infeasible).append(row)
    losses = np.array([_losses(row, objectives) for row in kept])
    for n, (row, own) in enumerate(zip(kept, losses)):
        if ((losses <= own).all(1) & (losses < own).any(1)).any():
            front.beaten.append(row)
        elif (losses[:n] == own).all(1).any():
            front.equal.append(row)
        else:
            front.best.append(row)
    return front


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _losses(row: dict, objectives: Sequence[Objective]) -> list[float]:
    """The objectives' values, lower is better."""
    return [row["metrics"][each.metric] * (1 if each.mode == "min" else -1) for each in objectives]


def said(constraints: Sequence[Constraint]) -> str:
    """As "gmacs <= 12, val_cosine >= 0.99"."""
    texts = [
        f"{each.metric} >= {each.at_least:g}" if each.at_most is None else f"{each.metric} <= {each.at_most:g}"
        for each in constraints
    ]
    return ", ".join(texts)


def front_section(front: Front, rows: Sequence[dict], axes: Sequence[str], name: str) -> tuple[str, dict[str, bytes]]:
    """The front of a sweep as Markdown with a table, and the PNG that it shows, if there is any, as `<name>.png`.

    Args:
        rows: all result rows; `metrics` may have `ms`, `ms_unpruned` and `speedup`, and `speed` the record that they
            are from (`patchrank.trial.speed.measure_trial`).
        axes: dotted paths of the swept settings.
    """
    sentence = _sentence(front, len(rows))
    if not front.best:
        return sentence, {}
    content, caption = draw_front(front)
    parts = [sentence, front_table(front, axes), _timed(rows), f"{caption}\n\n![Pareto front]({name}.png)"]
    return "\n\n".join(filter(None, parts)), {f"{name}.png": content}


def front_table(front: Front, axes: Sequence[str]) -> str:
    """Markdown: the unpruned tower, and the front by cost, numbered as the picture numbers it."""
    names = swept([Setting([row], [{}]) for row in front.best], axes)
    metrics = dict.fromkeys([*ALWAYS, *(each.metric for each in front.objectives)])
    metrics = [each for each in metrics if any(each in row["metrics"] for row in front.best)]
    unpruned = {metric: unpruned_figure(front.best, metric) for metric in metrics}
    lines = [["", "nothing pruned", *[""] * (len(names) - 1)]]
    lines += [[str(n + 1), *(texts[n] for texts in names.values())] for n in range(len(front.best))]
    for line, found in zip(lines, [unpruned, *(row["metrics"] for row in front.best)]):
        for metric in metrics:
            known = found.get(metric) is not None
            line.append(format(found[metric], COLUMNS[metric].layout) if known else "")
    return table(["#", *names, *(COLUMNS[metric].head for metric in metrics)], lines, texts=1 + len(names))


def _sentence(front: Front, count: int) -> str:
    """What the front is of, and what became of all other trials."""
    by = ", ".join(f"{each.metric} ({each.mode})" for each in front.objectives)
    bounds = said(front.constraints)
    kept = f" among those that keep {bounds}" if bounds else ""
    what = "no other is better in one of these and no worse in the rest"
    text = f"**Pareto front** of {by}{kept}: {len(front.best)} of {count} trials; {what}."
    rest = {
        f"breaking {bounds}": front.infeasible,
        "lacking a figure and left out": front.incomplete,
        "with exactly the figures of one in it and not repeated": front.equal,
    }
    others = "; ".join(f"{what}: {len(rows)}" for what, rows in rest.items() if rows)
    return f"{text} Of the others, {others}." if others else text


def _timed(rows: Sequence[dict]) -> str:
    """On what milliseconds were measured, and how."""
    machines = []
    for speed in [row["speed"] for row in rows if "speed" in row]:
        where, how = speed["hardware"], speed["benchmark"]
        device = where["gpu"] or f"{where['cpu']} (threads: {where['threads']})"
        runs = f"{how['repeats']} runs of {how['batch_size']} images"
        machines.append(f"{runs} on {device}, {where['system']}, torch {where['torch']}")
    if not machines:
        return ""
    how = "ms: of one image, median; each trial in turns with the unpruned tower, which gives the speed-up"
    return f"{how}; {' or '.join(dict.fromkeys(machines))}."


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
