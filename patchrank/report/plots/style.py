"""What the plots share: colours, the scale of an axis, and PNG. matplotlib loads when something is drawn."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable

import numpy as np

COLOURS = {
    "predictor": "#1b6ca8",
    "prior": "#7b4ea3",
    "center": "#8c6d46",
    "random": "#9a9a9a",
    "cls_attention": "#d9662b",
    "golden": "#2e8b57",
    "rank_merge": "#0b3c5d",
    "attention_merge": "#c2255c",
    "guided_merge": "#3aa6b9",
    "feature_merge": "#74a57f",
    "tome": "#b58900",
    "diffrate": "#d94801",
    "evit": "#6a51a3",
    "evit_norm": "#9e9ac8",
    "evit_drop": "#54278f",
    "avit": "#636363",
    "avit_flipped": "#969696",
    "avit_channel": "#bdbdbd",
    "pixel_variance": "#a6611a",
    "mlp_shift": "#80b1d3",
}
MARKERS = {
    **{"predictor": "o", "prior": "^", "center": "D", "random": "x", "cls_attention": "v", "golden": "s"},
    **{"rank_merge": "*", "attention_merge": "p", "guided_merge": "8", "feature_merge": "H", "tome": "d"},
    **{"diffrate": "<", "evit": ">", "evit_norm": ">", "evit_drop": ">", "avit": "X", "avit_flipped": "X"},
    **{"avit_channel": "X", "pixel_variance": "h", "mlp_shift": "h"},
}
PALETTE = ("#1b6ca8", "#c2410c", "#2e8b57", "#7b4ea3", "#b58900", "#be3a77")  # where colour tells other things apart
LEAST = 2.0  # points that an axis shows at least, so that noise is not blown up
WIDE = 10.0  # points; where changes span more, a linear axis would show small ones as none
TICKS = {"x": (-100, -10, -1, 0, 1, 10, 100)}  # there, labels stand beside each other
TICKS["y"] = (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100)


def colour_of(reducer: str) -> str:
    """The colour of a reducer in every picture; one of a user's own is dark grey."""
    return COLOURS.get(reducer, "#444444")


def is_wide(changes: np.ndarray) -> bool:
    """Whether an axis that shows these changes, in points, is logarithmic."""
    return max(0.0, np.max(changes)) - min(0.0, np.min(changes)) > WIDE


def log_note(*panels: np.ndarray) -> str:
    """What a caption says where the axis of any panel is logarithmic, by the changes that each shows."""
    return "; beyond 1 point the scale is logarithmic" if any(map(is_wide, panels)) else ""


def scale_points(panel, which: str, changes: np.ndarray) -> None:
    """Sets the axis `which` ("x" or "y") of a panel to show changes in points, and 0 among them.

    Small changes and collapses stand in one picture, so a wide axis is linear to 1 point and logarithmic beyond.
    """
    axis, set_limits = getattr(panel, f"{which}axis"), getattr(panel, f"set_{which}lim")
    low, high = min(0.0, float(np.min(changes))), max(0.0, float(np.max(changes)))
    if is_wide(changes):
        getattr(panel, f"set_{which}scale")("symlog", linthresh=1)
        low, high = 1.3 * low - 0.3, 1.3 * high + 0.3
        ticks = [tick for tick in TICKS[which] if low <= tick <= high]
        axis.set_ticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
        axis.set_ticks([], minor=True)
    else:
        spare = max(0.06 * (high - low), (LEAST - (high - low)) / 2)
        low, high = low - spare, high + spare
        panel.locator_params(axis=which, nbins=6)
    set_limits(low, high)
    axis.set_tick_params(labelsize=8)


def wrap(name: str, width: int) -> str:
    """A name on several lines if it must be; what stands between semicolons is kept together where it can be."""
    if len(name) <= width:
        return name
    return "\n".join(line for part in name.split("; ") for line in textwrap.wrap(part, width))


def add_legend(figure, panels: Iterable, columns: int) -> None:
    """Names what is drawn in some panels once, above all of them."""
    handles = {text: handle for panel in panels for handle, text in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns, fontsize=8, frameon=False)


def png(figure, dpi: int = 150) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.06)
    return buffer.getvalue()
