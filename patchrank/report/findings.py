"""What a sweep found, for somebody in a hurry: short sentences, a line for an index, and a table for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import NamedTuple

from patchrank.report.judgement import Judgement
from patchrank.report.labels import counted
from patchrank.report.markdown import listed, signed
from patchrank.report.results import Setting, change
from patchrank.utils.stats import Interval

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
