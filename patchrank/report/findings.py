"""What a sweep found, for somebody in a hurry: short sentences, a line for an index, and a table for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from textwrap import shorten

from patchrank.report.claims import Judgement
from patchrank.report.compare import change, mean, subset
from patchrank.report.labels import counted, labels
from patchrank.report.results import Setting
from patchrank.report.table import ON_SUBSET, signed, towers
from patchrank.utils.stats import Interval, spread

WIDTH = 100  # characters of a line in a terminal


def question(asked: str | None, axes: Sequence[str]) -> str:
    """What a sweep asks; where its file does not say it, what it sweeps."""
    swept = [axis.replace(".", " ").replace("_", " ") for axis in axes if axis not in ("seed", "controls")]
    *first, last = swept or ["pruning"]
    return asked or f"How does accuracy change with {', '.join(first)}{' and ' * bool(first)}{last}?"


def best_and_worst(settings: Sequence[Setting], names: Sequence[str]) -> str:
    """Two sentences: which setting changed accuracy most for the better and for the worse; one, of one setting.

    Oracles count only where there is nothing else. The images are said again where those of the worst are others.

    Args:
        names: what the settings are called, one for each.
    """
    changes = _changes(settings, names)
    what = "accuracy on val" if settings[0].on_val else "accuracy"
    (worst, worst_name, last), (best, best_name, first) = changes[0], changes[-1]
    found = f"{what} changes by {_points(best)} against nothing pruned, on {_images(first)}."
    if len(changes) == 1:
        return found.capitalize()
    others = f", on {_images(last)}" if _images(last) != _images(first) else ""
    return f"Best is {best_name}: {found} Worst is {worst_name}: {what} changes by {_points(worst)}{others}."


def moved(settings: Sequence[Setting], names: Sequence[str]) -> str:
    """In how many settings accuracy moved, of those that have an interval; oracles aside."""
    changes = [found for found, *_ in _changes(settings, names)]
    known = [found for found in changes if found.is_known]
    if len(changes) == 1 or not known:
        return ""
    fall, rise = sum(found.high < 0 for found in known), sum(found.low > 0 for found in known)
    rest = len(changes) - len(known)
    none = f" {rest} more {'has' if rest == 1 else 'have'} no interval." if rest else ""
    return f"Accuracy falls in {fall} and rises in {rise} of {len(known)} settings (95 % interval excludes 0).{none}"


def _changes(settings: Sequence[Setting], names: Sequence[str]) -> list[tuple[Interval, str, Setting]]:
    """The change of each setting with its name, the worst first."""
    named = [pair for pair in zip(settings, names) if not pair[0].is_oracle] or [*zip(settings, names)]
    return sorted([(change(each), name, each) for each, name in named], key=lambda found: found[0].estimate)


def _images(setting: Setting) -> str:
    values = setting.values(setting.shown("accuracy"))
    return counted(values.clusters, values.units)


def _points(found: Interval) -> str:
    """As "+0.17 points (95 % interval +0.02 to +0.30)"."""
    estimate, low, high = (f"{round(value, 2) + 0.0:+.2f}" for value in found[:3])
    return f"{estimate} points" + (f" (95 % interval {low} to {high})" if found.is_known else "")


def verdicts(judgements: Sequence[Judgement]) -> str:
    """How many claims hold."""
    counts = Counter(judgement.verdict for judgement in judgements)
    said = [_counted_verdict(counts[verdict], *words) for verdict, *words in WORDS if counts[verdict]]
    if not said:
        return "Nothing was claimed beforehand."
    *first, last = said
    text = f"{', '.join(first)}{' and ' * bool(first)}{last}"
    return f"Of {len(judgements)} claims, {text}." if len(judgements) > 1 else f"Its one claim {text.split(' ', 1)[1]}."


WORDS = (
    ("true", "holds", "hold"),
    ("refuted", "is refuted", "are refuted"),
    ("open", "is not told apart", "are not told apart"),
    ("not measured", "could not be measured", "could not be measured"),
)


def _counted_verdict(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def answer(
    settings: Sequence[Setting], names: Sequence[str], judgements: Sequence[Judgement], pictures: Sequence[str]
) -> dict[str, str]:
    """The answer to a sweep's question and its figure, as an index shows them: those of the claim that answers it.

    That is the claim marked `answers`, or else the first. Without claims the best and the worst setting answer.

    Args:
        names: what the settings are called, one for each.
        pictures: file names; the first is to be looked at where nothing was claimed.
    """
    if judgements:
        marked = [judgement for judgement in judgements if judgement.claim.answers]
        return dict(zip(("answer", "figure"), (marked or judgements)[0].headline))
    said = _briefly(settings, names) if settings else "No trial has a result."
    return {"answer": said, "figure": "".join(f"[picture]({name})" for name in pictures[:1])}


def _briefly(settings: Sequence[Setting], names: Sequence[str]) -> str:
    """The best and the worst change in less than 120 characters."""
    changes = _changes(settings, names)
    what = "Val accuracy" if settings[0].on_val else "Accuracy"
    if len(changes) == 1:
        return f"{what} changes by {changes[0][0].estimate:+.2f} points"
    best, worst = (f"{found.estimate:+.2f} points ({shorten(name, 28, placeholder=' …')})"
                   for found, name, _ in (changes[-1], changes[0]))  # fmt: skip
    return f"{what}: best {best}, worst {worst}"


def brief_table(settings: Sequence[Setting], axes: Sequence[str]) -> str:
    """One line for the unpruned tower and one for each setting, no wider than a terminal: plain text, not Markdown.

    A name that is too long loses its middle, marked by an ellipsis; where two would then read alike, each has
    its line's number behind it.
    """
    few, found = subset(settings), towers(settings)
    on_val = settings[0].on_val
    rows = [_unpruned(tower, len(found) > 1) for tower in found]
    rows += [_row(setting, name, few) for setting, name in zip(settings, labels(settings, axes))]
    head = ["setting", "accuracy, val" if on_val else "accuracy", "change, 95 % interval", "GMACs", "val"]
    columns = 5 if any(row[4] for row in rows) and not on_val else 4
    lines = [line[:columns] for line in (head, *rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(columns)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (columns - 1))
    texts = [text.ljust(widths[0]) for text in _shortened([line[0] for line in lines], widths[0])]
    rest = ["  ".join(cell.rjust(width) for cell, width in zip(line[1:], widths[1:])) for line in lines]
    note = [f"{ON_SUBSET} on the first {few} images of each task alone"] * bool(few)
    return "\n".join([*(f"{text}  {cells}".rstrip() for text, cells in zip(texts, rest)), *note])


def _unpruned(tower: Setting, is_one_of_several: bool) -> list[str]:
    which = f" ({tower.config['model']['name']}; {', '.join(tower.tasks)})" if is_one_of_several else ""
    accuracy, metrics = f"{mean(tower, 'unpruned'):.1f}", tower.metrics
    return [f"nothing pruned{which}", accuracy, "", f"{metrics['gmacs_unpruned']:.4f}", _val(metrics, "_unpruned")]


def _row(setting: Setting, name: str, few: int | None) -> list[str]:
    seeds = setting.seeds(setting.shown("accuracy"))
    accuracy = f"{mean(setting):.1f}" + (f" ± {spread(seeds):.1f}" if len(seeds) > 1 else "")
    accuracy += ON_SUBSET if few and setting.is_oracle else ""
    costs = f"{setting.metrics['gmacs']:.4f}"
    return [name, accuracy, signed(change(setting), bold=False), costs, _val(setting.metrics)]


def _val(metrics: dict[str, float], which: str = "") -> str:
    return f"{metrics[f'val_accuracy{which}']:.1f}" if f"val_accuracy{which}" in metrics else ""


def _shortened(names: Sequence[str], width: int) -> list[str]:
    texts = [_without_middle(name, width) for name in names]
    counts = Counter(texts)
    return [
        text if counts[text] == 1 or text == name else f"{_without_middle(name, width - len(f' #{n}'))} #{n}"
        for n, (name, text) in enumerate(zip(names, texts))
    ]


def _without_middle(name: str, width: int) -> str:
    kept = width - 1
    return name if len(name) <= width else f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"
