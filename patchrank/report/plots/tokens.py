"""Which tokens survive: images with their dropped patches veiled, a row for each setting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchrank.config import value_at
from patchrank.report.labels import KEEP_RATE, labels, plain
from patchrank.report.plots.style import png, wrap
from patchrank.report.results import Setting, all_tasks
from patchrank.utils.veil import veil_dropped

MAX_ROWS, MAX_COLUMNS = 12, 9
GAP, TASK_GAP = 4, 16  # pixels between pictures, and between tasks


def draw_tokens(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[bytes, str]:
    """The first images of all tasks (columns) with what survives in every setting (rows): PNG, and a caption."""
    from matplotlib.figure import Figure

    places, rate = _choose(settings, axes)
    names = labels(settings, axes, without=[KEEP_RATE] if rate else [])
    chosen, names = [settings[place] for place in places], ["image", *(names[place] for place in places)]
    tasks, count = all_tasks(chosen), max(1, MAX_COLUMNS // len(all_tasks(chosen)))
    strips = [_strips(chosen, task, count) for task in tasks]
    canvas, middles = _mosaic(strips)
    figure = Figure(figsize=(canvas.shape[1] / 80 + 2.0, canvas.shape[0] / 80 + 0.4), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(canvas, interpolation="nearest")
    pitch = canvas.shape[0] / len(names)
    axis.set_yticks(pitch * (np.arange(len(names)) + 0.5), [wrap(name, 24) for name in names], fontsize=9)
    axis.set_xticks(middles, tasks, fontsize=10)
    axis.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    some = f", for {len(places)} of {len(settings)} settings" if len(places) < len(settings) else ""
    which = f"{some}, with {rate} kept" if rate else some
    images = "validation" if settings[0].on_val else "test"
    return png(figure, 100), f"Which tokens survive, on {images} images{which}; dropped patches are veiled in grey."


def _choose(settings: Sequence[Setting], axes: Sequence[str]) -> tuple[list[int], str]:
    """Places of at most `MAX_ROWS` settings, evenly chosen. Of many, only those of the middle keep rate (returned)."""
    places, rate = list(range(len(settings))), ""
    if len(places) > MAX_ROWS and KEEP_RATE in axes:
        rates = [value_at(setting.config, KEEP_RATE) for setting in settings]
        middle = sorted(set(rates))[(len(set(rates)) - 1) // 2]
        places = [place for place in places if rates[place] == middle]
        rate = plain(middle, KEEP_RATE)
    if len(places) > MAX_ROWS:
        places = [places[n] for n in np.linspace(0, len(places) - 1, MAX_ROWS).round().astype(int)]
    return places, rate


def _strips(settings: Sequence[Setting], task: str, count: int) -> list[np.ndarray]:
    """The images of a task as they are, then as each setting leaves them, all (n, S, S, 3); white without the task."""
    strips = [next(each.arrays[0][f"{task}.pictures"] for each in settings if task in each.tasks)[:count]]
    for setting in settings:
        if task in setting.tasks:
            found = setting.arrays[0]
            strips.append(veil_dropped(strips[0], found[f"{task}.pictures_kept"][:count], found["grid"]))
        else:
            strips.append(np.full_like(strips[0], 255))
    return strips


def _mosaic(tasks: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, list[float]]:
    """All pictures on one white canvas (H, W, 3), and the middle of every task's columns."""
    parts, middles, left = [], [], 0
    for strips in tasks:
        padded = np.pad(np.stack(strips), [(0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)], constant_values=255)
        rows, count, height, width, _ = padded.shape
        block = padded.transpose(0, 2, 1, 3, 4).reshape(rows * height, count * width, 3)
        parts.append(np.pad(block, [(0, 0), (0, TASK_GAP), (0, 0)], constant_values=255))
        middles.append(left + (count * width - GAP) / 2)
        left += parts[-1].shape[1]
    return np.concatenate(parts, axis=1)[:, : -TASK_GAP - GAP], middles
