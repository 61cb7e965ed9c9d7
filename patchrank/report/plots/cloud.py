"""Change of accuracy against what an image costs: a dot for each of many settings, a panel for each task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchrank.report.compare import all_tasks, change_on
from patchrank.report.labels import ranking
from patchrank.report.plots.style import COLOURS, LOG_NOTE, OTHER, is_wide, png, scale_points
from patchrank.report.results import Setting

CAPTION = (
    "Change of accuracy against the unpruned tower (dashed line), in points, with 95 % intervals, by what an image "
    "costs{}{}."
)


def draw_cloud(settings: Sequence[Setting]) -> tuple[bytes, str]:
    """PNG and caption."""
    from matplotlib.figure import Figure

    tasks = all_tasks(settings)
    tasks = [*tasks, None] if len(tasks) > 1 else tasks
    figure = Figure(figsize=(3.2 * max(2, len(tasks)), 3.4), layout="constrained")
    spans = []
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        spans.append(_draw(panel, settings, task))
        panel.set_title(task or "mean", fontsize=9)
        panel.set_xlabel("GMACs", fontsize=9)
    figure.axes[0].set_ylabel("change of accuracy, points", fontsize=9)
    handles = {text: handle for panel in figure.axes for handle, text in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    hollow = "; hollow: oracles" if any(setting.is_oracle for setting in settings) else ""
    return png(figure), CAPTION.format(LOG_NOTE if any(map(is_wide, spans)) else "", hollow)


def _draw(panel, settings: Sequence[Setting], task: str | None) -> np.ndarray:
    """One panel; returns what its intervals span."""
    panel.axhline(0, color="black", lw=0.9, ls=(0, (4, 3)), zorder=1)
    span = [0.0]
    for setting in settings:
        if (found := change_on(setting, task)) is not None:
            colour = COLOURS.get(setting.config["pruning"]["reducer"], OTHER)
            low, high = found.ends
            bars = [[found.estimate - low], [high - found.estimate]]
            look = {"fmt": "o", "ms": 3.5, "lw": 0.7, "color": colour, "label": ranking(setting)}
            look["markerfacecolor"] = "white" if setting.is_oracle else colour
            panel.errorbar([setting.metrics["gmacs"]], [found.estimate], yerr=bars, **look)
            span += [low, high]
    scale_points(panel, "y", np.array(span))
    panel.grid(axis="y", lw=0.4, color="#dddddd")
    panel.tick_params(axis="x", labelsize=8)
    panel.locator_params(axis="x", nbins=5)
    panel.spines[["top", "right"]].set_visible(False)
    return np.array(span)
