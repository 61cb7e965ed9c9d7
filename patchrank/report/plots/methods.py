"""What each method keeps at the same cost: drift and accuracy over budgets or keep rates, where methods are many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchrank.config import value_at
from patchrank.report.labels import BUDGET, KEEP_RATE, LOCATIONS, labels, layers, plain, prompts, ranking
from patchrank.report.plots.style import MARKERS, colour_of, log_note, png, scale_points
from patchrank.report.results import Setting, change, mean, subset, worth_of

FEWEST_COSTS = 3
OURS = ("rank_merge", "attention_merge")  # drawn above the others, in thick lines
LEAST_DRIFT = 1e-3  # thousandths; a logarithmic axis has no place for none
COSTS = {BUDGET: "share of the unpruned tower's multiply-accumulates", KEEP_RATE: "share of patch tokens kept"}
CAPTION = (
    "What each method keeps at the same cost, on the mean of the tasks: 1000 (1 - cosine) to the unpruned embedding, "
    "and change of accuracy in points{}, by {}. Thick, with 95 % intervals: ranked matching, which is ours; dashed: "
    "the rest merges.{}"
)
BEST = " Of several settings of a method its best on validation images by cosine, without repair."
LEARNED = " Dashes and dots: with learned prompts."
ORACLES = " Dotted: oracles, on the first {} images of each task alone."


class Curves:
    """The lines of a picture, and what they run over.

    Args:
        settings: all of a report.
        axes: dotted paths of the swept settings.
    """

    def __init__(self, settings: Sequence[Setting], axes: Sequence[str]):
        self.settings = [each for each in settings if each.config.get("repair") is None]
        self.cost = BUDGET if len(self._costs(BUDGET)) >= FEWEST_COSTS else KEEP_RATE
        self.costs = self._costs(self.cost)
        self.by_layers = self.cost == KEEP_RATE and LOCATIONS in axes
        self.names = self._names(axes)

    def _costs(self, axis: str) -> list[float]:
        """The swept values of an axis, largest first."""
        return sorted({value_at(each.config, axis) for each in self.settings} - {None}, reverse=True)

    def _names(self, axes: Sequence[str]) -> list[str]:
        """What the line of each setting is called. At the same budget a method may have several settings."""
        if self.cost == KEEP_RATE:
            return labels(self.settings, axes, without=[KEEP_RATE, LOCATIONS])
        merges = {"merge": ", the rest merges"}
        return [ranking(each) + merges.get(each.leftovers, "") for each in self.settings]

    def rows(self) -> dict[str, dict[str, list[Setting]]]:
        """Title of a row of panels -> name of a line -> its points, the dearest first."""
        found: dict[str, dict[str, dict[float, Setting]]] = {}
        for name, setting in zip(self.names, self.settings):
            cost = value_at(setting.config, self.cost)
            if cost is not None:
                title = layers(plain(value_at(setting.config, LOCATIONS))) if self.by_layers else ""
                line = found.setdefault(title, {}).setdefault(name, {})
                line[cost] = max(line.get(cost, setting), setting, key=lambda each: each.metrics.get("val_cosine", 0))
        return {
            title: {name: [line[cost] for cost in sorted(line, reverse=True)] for name, line in lines.items()}
            for title, lines in found.items()
        }


def has_methods(settings: Sequence[Setting], axes: Sequence[str], crowded: bool) -> bool:
    """Whether there are budgets enough for lines, or keep rates enough whose own picture would be too crowded.

    Where a sampler draws keep rates, most lines would be single points.
    """
    curves = Curves(settings, axes)
    lengths = [len(points) for lines in curves.rows().values() for points in lines.values()]
    return len(lengths) > 0 and np.median(lengths) >= FEWEST_COSTS and (curves.cost == BUDGET or crowded)


def draw_methods(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """PNG and caption: a panel for drift and one for accuracy, a line for each method."""
    from matplotlib.figure import Figure

    curves = Curves(settings, axes)
    rows, few = curves.rows(), subset(settings)
    figure = Figure(figsize=(11.0, 0.4 + 4.2 * len(rows)), layout="constrained")
    panels, spans = figure.subplots(len(rows), 2, squeeze=False), []
    for (title, lines), (drift, accuracy) in zip(rows.items(), panels):
        spans.append(_draw_row(drift, accuracy, lines, curves.cost))
        for panel in (drift, accuracy):
            panel.set_title(title, fontsize=9)
            _finish(panel, [round(100 * cost, 6) for cost in curves.costs], COSTS[curves.cost])
    named = {}
    for panel in panels[:, 1]:
        named |= dict(zip(*reversed(panel.get_legend_handles_labels())))
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8, frameon=False)
    more = BEST if curves.cost == BUDGET else ""
    more += LEARNED if any(prompts(each) != "none" for each in settings) else ""
    more += ORACLES.format(few) if few else ""
    caption = CAPTION.replace("accuracy", worth_of(settings))
    return png(figure), caption.format(log_note(*spans), COSTS[curves.cost], more)


def _draw_row(drift, accuracy, lines: dict[str, list[Setting]], cost: str) -> np.ndarray:
    """Draws the lines of both panels; returns what the changes of accuracy span, in points."""
    spans = [np.zeros(1)]
    for name, points in lines.items():
        at, look = [round(100 * value_at(point.config, cost), 6) for point in points], _look(points[0], name)
        drift.plot(at, [max(LEAST_DRIFT, mean(point, "drift")) for point in points], **look)
        changes = [change(point) for point in points]
        low, high = np.array([found.ends for found in changes]).T
        accuracy.plot(at, [found.estimate for found in changes], **look)
        if points[0].config["pruning"]["reducer"] in OURS:  # bands of all would hide each other
            accuracy.fill_between(at, low, high, color=look["color"], alpha=0.12, lw=0)
        spans += [low, high]
    accuracy.axhline(0, color="black", lw=0.9, ls=(0, (4, 3)), label="unpruned", zorder=1)
    span = np.concatenate(spans)
    scale_points(accuracy, "y", span)
    drift.set_yscale("log")
    drift.yaxis.set_major_formatter("{x:g}")
    drift.set_ylabel("1000 (1 - cosine)", fontsize=9)
    worth = worth_of([point for points in lines.values() for point in points])
    accuracy.set_ylabel(f"change of {worth}, points", fontsize=9)
    return span


def _look(setting: Setting, name: str) -> dict:
    """Keywords of `plot` for the line of a setting's method."""
    reducer = setting.config["pruning"]["reducer"]
    style = ":" if setting.is_oracle else "--" if setting.leftovers == "merge" else "-"
    learned = {"none": {}, "text": {"ls": "-.", "mfc": "white"}}.get(prompts(setting), {"ls": "-."})
    width = {"lw": 2.6, "ms": 7, "zorder": 4} if reducer in OURS else {"lw": 1.1, "ms": 4, "zorder": 2}
    return (
        {"color": colour_of(reducer), "marker": MARKERS.get(reducer, "P"), "ls": style, "label": name} | width | learned
    )


def _finish(panel, ticks: Sequence[float], about: str) -> None:
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    panel.set_xlim(max(ticks) + 2, min(ticks) - 2)  # the cheaper, the further right
    panel.set_xlabel(f"{about}, %", fontsize=9)
    panel.grid(axis="y", lw=0.4, color="#dddddd")
    panel.spines[["top", "right"]].set_visible(False)
