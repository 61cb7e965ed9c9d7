"""What a sweep found, for somebody in a hurry: three sentences, a line for an index, and a table for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from patchrank.metrics import spread
from patchrank.report.claims import Judgement
from patchrank.report.compare import change, mean, subset
from patchrank.report.names import counted, labels
from patchrank.report.results import Setting
from patchrank.report.tables import ON_SUBSET, signed, towers

WIDTH = 100  # characters of a line in a terminal


def question(asked: str | None, axes: Sequence[str]) -> str:
    """What a sweep asks; where its file does not say it, what it sweeps."""
    swept = [axis.replace(".", " ").replace("_", " ") for axis in axes if axis not in ("seed", "controls")]
    *first, last = swept or ["pruning"]
    return asked or f"How does accuracy change with {', '.join(first)}{' and ' * bool(first)}{last}?"


def moves(settings: Sequence[Setting], axes: Sequence[str]) -> str:
    """In how many settings accuracy moved, and the best and the worst of them; oracles aside.

    Where some saw more images than others, the count of images is the largest.
    """
    names = labels(settings, axes)
    named = [pair for pair in zip(settings, names) if not pair[0].is_oracle] or [*zip(settings, names)]
    changes = sorted([(change(each), name, each) for each, name in named], key=lambda found: found[0].estimate)
    most, _, setting = max(changes, key=lambda found: found[0].n)
    what = "Accuracy on val" if settings[0].on_val else "Accuracy"
    images = f"on {counted(most.n, most.clusters, setting.unit())}"
    (worst, worst_name, _), (best, best_name, _) = changes[0], changes[-1]
    if len(changes) == 1:
        return f"{what} changes by {_points(best)} against nothing pruned, {images}."
    fall, rise = sum(each.high < 0 for each, *_ in changes), sum(each.low > 0 for each, *_ in changes)
    return (
        f"{what} falls in {fall} and rises in {rise} of {len(changes)} settings (95 % interval excludes 0), against "
        f"nothing pruned {images}; the best change is {_points(best)} ({best_name}), the worst {_points(worst)} "
        f"({worst_name})."
    )


def _points(found) -> str:
    estimate, *rest = signed(found, bold=False).split(" ", 1)
    return " ".join([estimate, "points", *rest])


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
    settings: Sequence[Setting], axes: Sequence[str], judgements: Sequence[Judgement], pictures: Sequence[str]
) -> dict[str, str]:
    """The answer to a sweep's question and its figure, as an index shows them: those of the first claim.

    Args:
        pictures: file names; the first is to be looked at where nothing was claimed.
    """
    if judgements:
        return dict(zip(("answer", "figure"), judgements[0].headline))
    said = moves(settings, axes) if settings else "No trial has a result."
    return {"answer": said, "figure": "".join(f"[picture]({name})" for name in pictures[:1])}


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
