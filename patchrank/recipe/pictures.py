"""Two pictures of a card: what is left of images, and how far each setting that was tried drifts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchrank.config import TrialConfig
from patchrank.recipe.card import name_of
from patchrank.report.plots.style import colour_of, png

DOTS = 8  # settings of a method that are drawn, the best ones


def draw_pairs(pairs: np.ndarray) -> bytes:
    """PNG of images (n, 2, S, S, 3), each above what is left of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * len(pairs), 3.1))
    panels = figure.subplots(2, len(pairs), squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    for column, pair in enumerate(pairs):
        for row, pixels in enumerate(pair):
            panels[row, column].imshow(pixels, interpolation="nearest")
            panels[row, column].set_axis_off()
    return png(figure)


def draw_tries(drift: dict[TrialConfig, float], choice: TrialConfig) -> bytes:
    """PNG of the drift of all settings that were tried, a row a method, the chosen one ringed."""
    from matplotlib.figure import Figure

    rows: dict[str, list[TrialConfig]] = {}
    for trial in sorted(drift, key=drift.__getitem__):
        rows.setdefault(name_of(trial), []).append(trial)
    figure = Figure(figsize=(7.0, 0.6 + 0.32 * len(rows)), layout="constrained")
    panel = figure.subplots()
    for row, trials in enumerate(rows.values()):
        _dots(panel, row, [drift[trial] for trial in trials[:DOTS]], colour_of(trials[0].pruning.reducer))
    place = list(rows).index(name_of(choice))
    panel.scatter([_shown(drift[choice])], [place], s=150, facecolors="none", edgecolors="black", linewidths=1.4)
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("drift, 1000 (1 - cosine) to the unpruned embedding; ringed: chosen", fontsize=8)
    panel.grid(axis="x", lw=0.4, color="#dddddd")
    panel.spines[["top", "right"]].set_visible(False)
    return png(figure)


def _dots(panel, row: int, drifts: Sequence[float], colour: str) -> None:
    panel.scatter([_shown(each) for each in drifts], [row] * len(drifts), s=22, color=colour, alpha=0.7, lw=0)


def _shown(drift: float) -> float:
    """Thousandths; a logarithmic axis has no place for none."""
    return max(1e-3, 1000 * drift)
