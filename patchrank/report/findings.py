"""What a sweep found, for somebody in a hurry: short sentences, a line for an index, and a table for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import NamedTuple

from patchrank.report.judgement import Judgement
from patchrank.report.labels import counted, labels
from patchrank.report.markdown import listed, signed
from patchrank.report.results import Setting, change, mean, subset
from patchrank.report.table import ON_SUBSET, change_text, mean_text, towers, val_text
from patchrank.utils.stats import Interval

WIDTH = 100  # characters of a line in a terminal
NO_RESULT = "No trial has a result."
WORDS = {  # verdict -> what is said of one claim, and of several
    "true": ("holds", "hold"),
    "refuted": ("is refuted", "are refuted"),
    "open": ("is not told apart", "are not told apart"),
    "not measured": ("could not be measured", "could not be measured"),
}


class Change(NamedTuple):
    """How accuracy changed in one setting, and what that setting is called."""

    found: Interval
    name: str
    setting: Setting

    def __str__(self) -> str:
        """As "accuracy changes by +0.17 points (95 % interval +0.02 to +0.30)"."""
        what = "accuracy on val" if self.setting.on_val else "accuracy"
        estimate, low, high = map(signed, self.found[:3])
        interval = f" (95 % interval {low} to {high})" if self.found.is_known else ""
        return f"{what} changes by {estimate} points{interval}"


def question(asked: str | None, axes: Sequence[str]) -> str:
    """What a sweep asks; where its file does not say it, what it sweeps."""
    swept = [axis.replace(".", " ").replace("_", " ") for axis in axes if axis not in ("seed", "controls")]
    return asked or f"How does accuracy change with {listed(swept or ['pruning'])}?"


def changes_of(settings: Sequence[Setting], names: Iterable[str]) -> list[Change]:
    """The change of each setting that is no oracle, the worst first; of the oracles where there is nothing else.

    Args:
        names: what the settings are called, one for each.
    """
    changes = [Change(change(setting), name, setting) for setting, name in zip(settings, names)]
    changes = [each for each in changes if not each.setting.is_oracle] or changes
    return sorted(changes, key=lambda each: each.found.estimate)


def best_and_worst(changes: Sequence[Change]) -> str:
    """Two sentences: which setting changed accuracy most for the better and for the worse; one, of one setting.

    The images are said again where those of the worst are others.
    """
    worst, best = changes[0], changes[-1]
    images, others = (counted(each.setting.values(each.setting.shown("accuracy"))) for each in (best, worst))
    found = f"{best} against nothing pruned, on {images}."
    if len(changes) == 1:
        return found.capitalize()
    others = f", on {others}" if others != images else ""
    return f"Best is {best.name}: {found} Worst is {worst.name}: {worst}{others}."


def moved(changes: Sequence[Change]) -> str:
    """In how many settings accuracy moved, of those that have an interval."""
    known = [each.found for each in changes if each.found.is_known]
    if len(changes) == 1 or not known:
        return ""
    fall, rise = sum(found.high < 0 for found in known), sum(found.low > 0 for found in known)
    text = f"Accuracy falls in {fall} and rises in {rise} of {len(known)} settings (95 % interval excludes 0)."
    if rest := len(changes) - len(known):
        text += f" {rest} more {'has' if rest == 1 else 'have'} no interval."
    return text


def verdicts(judgements: Sequence[Judgement]) -> str:
    """How many claims hold."""
    if not judgements:
        return "Nothing was claimed beforehand."
    counts = Counter(judgement.verdict for judgement in judgements)
    if len(judgements) == 1:
        return f"Its one claim {WORDS[judgements[0].verdict][0]}."
    said = [
        f"{counts[verdict]} {one if counts[verdict] == 1 else many}"
        for verdict, (one, many) in WORDS.items()
        if counts[verdict]
    ]
    return f"Of {len(judgements)} claims, {listed(said)}."


def answer(changes: Sequence[Change], judgements: Sequence[Judgement], pictures: Sequence[str]) -> dict[str, str]:
    """The answer to a sweep's question and its figure, as an index shows them.

    They are those of the claim marked `answers`, or else of the first claim. Without claims the best and the worst
    setting answer, in less than 120 characters.

    Args:
        pictures: file names; the first is to be looked at where nothing was claimed.
    """
    if judgements:
        marked = [judgement for judgement in judgements if judgement.claim.answers]
        said, figure = (marked or judgements)[0].headline
        return {"answer": said, "figure": figure}
    figure = f"[picture]({pictures[0]})" if pictures else ""
    if not changes:
        return {"answer": NO_RESULT, "figure": figure}
    what = "Val accuracy" if changes[0].setting.on_val else "Accuracy"
    points = [f"{each.found.estimate:+.2f} points" for each in changes]
    if len(changes) == 1:
        return {"answer": f"{what} changes by {points[0]}", "figure": figure}
    worst, best = (f"{points[n]} ({shorten(changes[n].name, 28, placeholder=' …')})" for n in (0, -1))
    return {"answer": f"{what}: best {best}, worst {worst}", "figure": figure}


def brief_table(settings: Sequence[Setting], axes: Sequence[str]) -> str:
    """One line for the unpruned tower and one for each setting, no wider than a terminal: plain text, not Markdown.

    A name that is too long loses its middle, which an ellipsis marks. Where two would then read alike, each ends in
    its line's number.
    """
    few, found = subset(settings), towers(settings)
    head = "accuracy, val" if settings[0].on_val else "accuracy"
    lines = [["setting", head, "change, 95 % interval", "GMACs", "val"]]
    for tower in found:
        which = f" ({tower.config['model']['name']}; {', '.join(tower.tasks)})" if len(found) > 1 else ""
        gmacs, val = f"{tower.metrics['gmacs_unpruned']:.4f}", val_text(tower, "val_accuracy_unpruned")
        lines.append([f"nothing pruned{which}", f"{mean(tower, 'unpruned'):.1f}", "", gmacs, val])
    for setting, name in zip(settings, labels(settings, axes)):
        accuracy = mean_text(setting) + (ON_SUBSET if few and setting.is_oracle else "")
        gmacs, val = f"{setting.metrics['gmacs']:.4f}", val_text(setting, "val_accuracy")
        lines.append([name, accuracy, change_text(change(setting), bold=False), gmacs, val])
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    texts = _aligned(lines)
    return "\n".join([*texts, f"{ON_SUBSET} on the first {few} images of each task alone"] if few else texts)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a name and figures as text, names shortened so far that no line is wider than a terminal."""
    names, *columns = zip(*lines)
    widths = [max(map(len, column)) for column in columns]
    width = min(max(map(len, names)), WIDTH - sum(widths) - 2 * len(widths))
    texts = [_without_middle(name, width) for name in names]
    counts = Counter(texts)
    for n, (name, text) in enumerate(zip(names, texts)):
        if text != name and counts[text] > 1:
            texts[n] = f"{_without_middle(name, width - len(f' #{n}'))} #{n}"
    padded = [[text.ljust(width) for text in texts]]
    padded += [[cell.rjust(width) for cell in column] for column, width in zip(columns, widths)]
    return ["  ".join(cells).rstrip() for cells in zip(*padded)]


def _without_middle(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    behind = (width - 1) // 2
    return f"{name[: width - 1 - behind]}…{name[len(name) - behind :]}"
