"""What each method keeps at the same cost: drift and accuracy over budgets, where a sweep has several of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchrank.config import value_at
from patchrank.report.labels import BUDGET, ranking
from patchrank.report.plots.style import MARKERS, colour_of, log_note, png, scale_points
from patchrank.report.results import Setting, change, mean

FEWEST_BUDGETS = 3
OURS = ("rank_merge", "attention_merge")  # drawn above the others, in thick lines
LEAST_DRIFT = 1e-3  # thousandths; a logarithmic axis has no place for none
CAPTION = (
    "What each method keeps at the same cost, on the mean of the tasks: 1000 (1 - cosine) to the unpruned embedding, "
    "and change of accuracy in points{}, by share of the unpruned tower's multiply-accumulates. Of several settings of "
    "a method its best on validation images by cosine, without repair; thick, with 95 % intervals: ranked matching, "
    "which is ours; dashed: the rest merges."
)


def has_budgets(settings: Sequence[Setting]) -> bool:
    """Whether there are budgets enough for lines."""
    return len(_budgets(settings)) >= FEWEST_BUDGETS


def draw_budgets(settings: Sequence[Setting]) -> tuple[bytes, str]:
    """PNG and caption: a panel for drift and one for accuracy, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    drift, accuracy = figure.subplots(1, 2)
    spans = [np.zeros(1)]
    for points in _lines(settings):
        setting, at = points[0], [round(100 * value_at(point.config, BUDGET), 6) for point in points]
        look = _look(setting)
        drift.plot(at, [max(LEAST_DRIFT, mean(point, "drift")) for point in points], **look)
        changes = [change(point) for point in points]
        low, high = np.array([found.ends for found in changes]).T
        accuracy.plot(at, [found.estimate for found in changes], **look)
        if setting.config["pruning"]["reducer"] in OURS:  # bands of all would hide each other
            accuracy.fill_between(at, low, high, color=look["color"], alpha=0.12, lw=0)
        spans += [low, high]
    span = np.concatenate(spans)
    accuracy.axhline(0, color="black", lw=0.9, ls=(0, (4, 3)), label="unpruned", zorder=1)
    drift.set_yscale("log")
    drift.yaxis.set_major_formatter("{x:g}")
    scale_points(accuracy, "y", span)
    drift.set_ylabel("1000 (1 - cosine)", fontsize=9)
    accuracy.set_ylabel("change of accuracy, points", fontsize=9)
    for panel in (drift, accuracy):
        _finish(panel, [100 * budget for budget in _budgets(settings)])
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return png(figure), CAPTION.format(log_note(span))


def _budgets(settings: Sequence[Setting]) -> list[float]:
    """The swept budgets, largest first."""
    return sorted({value_at(each.config, BUDGET) for each in settings} - {None}, reverse=True)


def _lines(settings: Sequence[Setting]) -> list[list[Setting]]:
    """For each method its best setting at every budget, largest budget first."""
    found: dict[tuple, dict[float, Setting]] = {}
    for setting in settings:
        budget, pruning = value_at(setting.config, BUDGET), setting.config["pruning"]
        if budget is not None and setting.config.get("repair") is None:
            line = found.setdefault((pruning["reducer"], setting.leftovers), {})
            line[budget] = max(line.get(budget, setting), setting, key=lambda each: each.metrics["val_cosine"])
    return [[line[budget] for budget in sorted(line, reverse=True)] for line in found.values()]


def _look(setting: Setting) -> dict:
    """Keywords of `plot` for the line of a setting's method."""
    reducer, merged = setting.config["pruning"]["reducer"], setting.leftovers == "merge"
    ours = {"lw": 2.6, "ms": 7, "zorder": 4} if reducer in OURS else {"lw": 1.1, "ms": 4, "zorder": 2}
    name = f"{ranking(setting)}, the rest merges" if merged else ranking(setting)
    return {
        "color": colour_of(reducer),
        "marker": MARKERS.get(reducer, "P"),
        "ls": "--" if merged else "-",
        "label": name,
    } | ours


def _finish(panel, ticks: Sequence[float]) -> None:
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    panel.set_xlim(max(ticks) + 2, min(ticks) - 2)  # the cheaper, the further right
    panel.set_xlabel("share of the unpruned tower's MACs, %", fontsize=9)
    panel.grid(axis="y", lw=0.4, color="#dddddd")
    panel.spines[["top", "right"]].set_visible(False)
