"""The pictures of a sweep: how accuracy changes in every setting, and which tokens survive.

Change of accuracy is drawn as curves over keep rates where lines are few, otherwise as a row of dots for each setting.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np

from patchrank.config import value_at
from patchrank.report.labels import KEEP_RATE, LOCATIONS, labels, layers, plain, ranking, swept_rates
from patchrank.report.markdown import signed
from patchrank.report.plots.style import MARKERS, PALETTE, add_legend, colour_of, log_note, png, scale_points, wrap
from patchrank.report.results import Setting, all_tasks, change, mean, subset, worth_of
from patchrank.utils.veil import MERGED, draw_left

FEWEST_RATES, MOST_LINES = 3, 8  # of curves
MOST_DOTS, MOST_ROWS = 100, 40  # of one panel of dots
CURVES = (
    "Change of accuracy against the unpruned tower (dashed line), in points, by share of patch tokens kept; bands are "
    "95 % intervals{}."
)
CURVES_OF_ORACLES = " Oracles (golden, dashed lines): on the first {} images of each task alone."
DOTS = "Change of accuracy against the unpruned tower, in points, with 95 % intervals{}{}."
DOTS_OF_ORACLES = "; hollow: oracles, on the first {} images of each task alone"
MAX_ROWS, MAX_COLUMNS = 12, 9
MAX_LINES = 5  # of a name in letters of the usual size beside a row of pictures
GAP, TASK_GAP = 4, 16  # pixels between pictures, and between tasks


class Line(NamedTuple):
    """How a line is drawn, by keywords of `plot`, and the settings that are its points."""

    look: dict
    points: list[Setting]


def draw_sweep(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """PNG and caption: curves over the keep rates where lines are few, otherwise a row of dots for each setting."""
    draw = _draw_curves if _has_curves(settings, axes) else _draw_dots
    picture, caption = draw(settings, axes)
    caption = caption.replace("accuracy", worth_of(settings), 1)
    return picture, f"{caption} On validation images." if settings[0].on_val else caption


def is_crowded(settings: Sequence[Setting], axes: Sequence[str]) -> bool:
    """Whether settings are too many for curves and for rows, as where a sampler draws them."""
    rows = len(set(labels(settings, axes, without=[KEEP_RATE])))
    is_full = rows > MOST_ROWS or rows * max(1, len(swept_rates(settings, axes))) > MOST_DOTS
    return is_full and not _has_curves(settings, axes)


def _has_curves(settings: Sequence[Setting], axes: Sequence[str]) -> bool:
    lines = set(labels(settings, axes, without=[KEEP_RATE, LOCATIONS]))
    return len(swept_rates(settings, axes)) >= FEWEST_RATES and len(lines) <= MOST_LINES


def _draw_curves(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """A panel for each task and, where they are swept, each set of locations; a line for all else that is swept."""
    from matplotlib.figure import Figure

    rows: dict[str, list[Setting]] = {}  # what stands below a panel's title -> settings
    for setting in settings:
        where = f"\n{layers(plain(value_at(setting.config, LOCATIONS)))}" if LOCATIONS in axes else ""
        rows.setdefault(where, []).append(setting)
    lines, tasks, few = curve_lines(settings, axes), all_tasks(settings), subset(settings)
    rates = [100 * rate for rate in swept_rates(settings, axes)]  # of all panels
    height = (2.6 if len(rows) > 1 else 2.5) * len(rows) + 0.35 + 0.22 * -(-len(lines) // 3)
    figure = Figure(figsize=(3.3 * max(2, len(tasks)), height), layout="constrained")
    panels, spans = figure.subplots(len(rows), len(tasks), squeeze=False, sharex=True), []
    for (where, members), row in zip(rows.items(), panels):
        for task, panel in zip(tasks, row):
            having = [setting for setting in members if task in setting.tasks]
            here = [Line(look, [point for point in points if point in having]) for look, points in lines]
            spans.append(draw_panel(panel, here, task, rates))
            full = min(having, key=lambda setting: setting.is_oracle, default=None)  # has all images, where any has
            unpruned = f", unpruned {mean(full, 'unpruned', task):.1f} %" if full else ""
            panel.set_title(f"{task}{unpruned}{where}", fontsize=9)
    for panel in panels[:, 0]:
        panel.set_ylabel(f"change of {worth_of(settings)}, points", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("patch tokens kept, %", fontsize=9)
    add_legend(figure, panels.flat, columns=3)
    return png(figure), CURVES.format(log_note(*spans)) + (CURVES_OF_ORACLES.format(few) if few else "")


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
        colour, style = colours.get(others[name], colour_of(reducer)), {"golden": "--", "random": ":"}.get(reducer, "-")
        look = {"color": colour, "ls": style, "marker": MARKERS.get(reducer, "P"), "label": name}
        lines.append(Line(look, groups[name]))
    return lines


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
        points = sorted(points, key=lambda point: value_at(point.config, KEEP_RATE))
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


def _draw_dots(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """A panel for each task, a row for each setting. Where keep rates are swept too, a row has a dot for each."""
    from matplotlib.figure import Figure

    names, tasks = labels(settings, axes, without=[KEEP_RATE]), all_tasks(settings)
    rates, few = swept_rates(settings, axes)[::-1], subset(settings)
    rows, tasks = list(dict.fromkeys(names)), [*tasks, None] if len(tasks) > 1 else tasks
    texts = [wrap(row, 30) for row in rows]
    height = (0.24 + 0.12 * max(1, len(rates))) * len(rows) + 0.1 * "".join(texts).count("\n") + 0.9
    figure = Figure(figsize=(2.1 * max(2, len(tasks)) + 2.0, height), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    span = [change(each, task).ends for task in tasks for each in settings if task in (None, *each.tasks)]
    below = {rate: 0.7 * ((n + 0.5) / len(rates) - 0.5) for n, rate in enumerate(rates)}  # the middle of its row
    for panel, task in zip(panels, tasks):
        panel.set_title(task or "mean", fontsize=10)
        panel.set_xlabel("points", fontsize=9)
        for name, setting in zip(names, settings):
            if task in (None, *setting.tasks):
                place = rows.index(name) + below.get(value_at(setting.config, KEEP_RATE), 0.0)
                _draw_dot(panel, setting, task, place, rates)
        panel.axvline(0, color="black", lw=0.9, ls=(0, (4, 3)), zorder=1)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", lw=0.4, color="#dddddd")
        panel.spines[["top", "right", "left"]].set_visible(False)
        scale_points(panel, "x", np.array(span))
    panels[0].set_yticks(range(len(rows)), texts, fontsize=9)
    panels[0].set_ylim(len(rows) - 0.4, -0.7)
    if rates:
        add_legend(figure, panels[:1], columns=5)
    return png(figure), DOTS.format(log_note(np.array(span)), DOTS_OF_ORACLES.format(few) if few else "")


def _draw_dot(panel, setting: Setting, task: str | None, place: float, rates: Sequence[float]) -> None:
    """The change of one setting. Colour tells the keep rate where that is swept, else the ranking."""
    found, rate = change(setting, task), value_at(setting.config, KEEP_RATE)
    colour, label = colour_of(setting.config["pruning"]["reducer"]), None
    if rates:
        colour, label = PALETTE[rates.index(rate) % len(PALETTE)], f"{plain(rate, KEEP_RATE)} kept"
    bars = [[found.estimate - found.ends[0]], [found.ends[1] - found.estimate]]
    look = {"fmt": "o", "ms": 4 if rates else 5, "lw": 1.3, "color": colour, "label": label, "zorder": 3}
    face = "white" if setting.is_oracle else colour
    panel.errorbar([found.estimate], [place], xerr=bars, markerfacecolor=face, **look)
    if not rates:  # there is room for the number
        box = {"facecolor": "white", "lw": 0, "pad": 0.6, "alpha": 0.8}
        at = {"xytext": (0, 5.5), "textcoords": "offset points", "ha": "center"}
        text = signed(found.estimate, 1)
        panel.annotate(text, (found.estimate, place), fontsize=7, color=colour, bbox=box, **at)


def draw_tokens(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """The first images of all tasks (columns) with what survives in every setting (rows): PNG, and a caption."""
    from matplotlib.figure import Figure

    places, rate = _choose(settings, axes)
    names = labels(settings, axes, without=[KEEP_RATE] if rate else [])
    chosen, names = [settings[place] for place in places], ["image", *(names[place] for place in places)]
    tasks, count = all_tasks(chosen), max(1, MAX_COLUMNS // len(all_tasks(chosen)))
    canvas, middles = _mosaic(chosen, tasks, count)
    figure = Figure(figsize=(canvas.shape[1] / 80 + 2.0, canvas.shape[0] / 80 + 0.4), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(canvas, interpolation="nearest")
    pitch = canvas.shape[0] / len(names)
    texts, size = _row_names(names)
    axis.set_yticks(pitch * (np.arange(len(names)) + 0.5), texts, fontsize=size)
    axis.set_xticks(middles, tasks, fontsize=10)
    axis.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    some = f", for {len(places)} of {len(settings)} settings" if len(places) < len(settings) else ""
    which = f"{some}, with {rate} kept" if rate else some
    images = "validation" if settings[0].on_val else "test"
    merged = any(f"{task}.pictures_source" in each.arrays[0] for each in chosen for task in each.tasks)
    shown = f"dropped patches are veiled in grey{f'; {MERGED}' if merged else ''}"
    return png(figure, 100), f"Which tokens survive, on {images} images{which}; {shown}."


def _row_names(names: Sequence[str]) -> tuple[list[str], int]:
    """Names on as many lines as fit beside a row of pictures, and the size of their letters."""
    texts = [wrap(name, 24) for name in names]
    if max(text.count("\n") for text in texts) < MAX_LINES:
        return texts, 9
    return [textwrap.fill(name, 36) for name in names], 7


def _choose(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[list[int], str]:
    """Places of at most `MAX_ROWS` settings, evenly chosen. Of many, only those of the middle keep rate (returned)."""
    places, rate, rates = list(range(len(settings))), "", swept_rates(settings, axes)
    if len(places) > MAX_ROWS and rates:
        middle = rates[(len(rates) - 1) // 2]
        places = [place for place in places if value_at(settings[place].config, KEEP_RATE) == middle]
        rate = plain(middle, KEEP_RATE)
    if len(places) > MAX_ROWS:
        places = [places[n] for n in np.linspace(0, len(places) - 1, MAX_ROWS).round().astype(int)]
    return places, rate


def _mosaic(settings: Sequence[Setting], tasks: Sequence[str], count: int) -> tuple[np.ndarray, list[float]]:
    """All pictures on one white canvas (H, W, 3), and the middle of every task's columns.

    The first `count` images of each task stand on top as they are, and below as each setting leaves them.
    """
    parts, middles, left = [], [], 0
    for task in tasks:
        images = next(each.arrays[0][f"{task}.pictures"] for each in settings if task in each.tasks)[:count]
        strips = [images]
        for setting in settings:
            found = setting.arrays[0]
            if task in setting.tasks:
                kept, source = found[f"{task}.pictures_kept"][:count], found.get(f"{task}.pictures_source")
                strips.append(draw_left(images, kept, None if source is None else source[:count], found["grid"]))
            else:
                strips.append(np.full_like(images, 255))
        padded = np.pad(np.stack(strips), [(0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)], constant_values=255)
        rows, columns, height, width, _ = padded.shape
        block = padded.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
        parts.append(np.pad(block, [(0, 0), (0, TASK_GAP), (0, 0)], constant_values=255))
        middles.append(left + (columns * width - GAP) / 2)
        left += parts[-1].shape[1]
    return np.concatenate(parts, axis=1)[:, : -TASK_GAP - GAP], middles
