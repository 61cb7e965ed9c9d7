"""Claims of a sweep file, judged by its results: true, refuted or not told apart, with the figures that say so.

A difference is per image and paired, averaged over seeds; its interval draws whole digits, groups
or images, whichever the data is drawn by (`metrics.paired_interval`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchrank.config import BESIDE, Claim, leaves, value_at
from patchrank.report.labels import counted, plain
from patchrank.report.results import Setting, Values, configuration
from patchrank.utils.errors import UserError
from patchrank.utils.stats import Interval, holm, paired_interval

PLAIN = {"cosine", "val_cosine", "drift", "val_drift", "kendall", "ndcg"}  # measures that are no percentages


@dataclass(frozen=True)
class Comparison:
    """One difference: the values of `each` that it is for, its interval, p after Holm, and true, refuted or open.

    images: what it is measured on, as "1077 images of 359 digits".
    """

    what: dict[str, Any]
    interval: Interval
    holm_p: float
    verdict: str
    images: str


@dataclass(frozen=True)
class Judgement:
    """A claim with its comparisons, and for every one that could not be made, why; over several, all images at once.

    p values are for a difference of 0, whatever the claim allows; Holm's are over the comparisons of this claim.
    """

    claim: Claim
    comparisons: list[Comparison]
    missing: list[str]
    overall: Interval | None = None

    @property
    def verdict(self) -> str:
        """true (everywhere), refuted (anywhere), open or not measured; where a part is missing, nothing is true.

        One loss among many may be luck: where sides contend several times, only one that stands after Holm refutes.
        """
        verdicts = {each.verdict for each in self.comparisons}
        if not verdicts:
            return "not measured"
        contest = _is_contest(self.claim) and len(self.comparisons) > 1
        if any(each.verdict == "refuted" and (each.holm_p < 0.05 or not contest) for each in self.comparisons):
            return "refuted"
        return "true" if verdicts == {"true"} and not self.missing else "open"

    @property
    def figure(self) -> str:
        """The difference with its interval, or how many comparisons went which way and their range; what is missing."""
        text = _figure(self.claim, self.comparisons[0].interval) if len(self.comparisons) == 1 else _counts(self)
        missing = ", ".join(self.missing)
        return "; ".join(filter(None, [text, f"not measured: {missing}" if text and missing else missing]))

    @property
    def headline(self) -> tuple[str, str]:
        """What an index says: verdict and sentence, with how often it holds of several; and one figure."""
        said = f"**{_word(self.verdict)}**: {self.claim.say}"
        if len(self.comparisons) < 2:
            return said, self.figure
        return f"{said}: {_tally(self.claim, self.comparisons)}", f"on average {_figure(self.claim, self.overall)}"

    @property
    def images(self) -> str:
        """What a comparison is made on: "1077 images of 359 digits"; the ends of the range where they differ."""
        sizes = sorted({(each.interval.n, each.interval.clusters, each.images) for each in self.comparisons})
        return " to ".join(images for *_, images in dict.fromkeys(sizes[:1] + sizes[-1:]))

    def line(self) -> str:
        """Verdict, sentence, figure and images as one line of Markdown."""
        return f"**{_word(self.verdict)}**: {self.claim.say}: {'; '.join(filter(None, [self.figure, self.images]))}"

    def to_json(self) -> dict[str, Any]:
        comparisons = [
            {
                "what": each.what,
                **each.interval._asdict(),
                "holm_p": each.holm_p,
                "verdict": each.verdict,
                "images": each.images,
            }
            for each in self.comparisons
        ]
        claim = self.claim.model_dump(exclude_unset=True)
        overall = self.overall and self.overall._asdict()
        found = {"claim": claim, "verdict": self.verdict, "comparisons": comparisons, "missing": self.missing}
        return found | {"overall": overall}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Judgement:
        comparisons = []
        for each in saved["comparisons"]:
            interval = Interval(**{name: each[name] for name in Interval._fields})
            comparisons.append(Comparison(each["what"], interval, each["holm_p"], each["verdict"], each["images"]))
        overall = saved["overall"] and Interval(**saved["overall"])
        return cls(Claim.model_validate(saved["claim"]), comparisons, saved["missing"], overall)


Side = tuple[Setting, str]  # a setting and the measure that is taken of it
Differences = tuple[np.ndarray, np.ndarray, np.ndarray]  # of each image, what it is drawn with, the word for that


def judge(claim: Claim, settings: Sequence[Setting]) -> Judgement:
    """Compares the settings that a claim is about with what it sets them against.

    A partner is the setting whose configuration is the same but for what `against` changes; where that is the setting
    itself, nothing is compared. An oracle's subset is compared with the same images of the other side.

    Raises:
        UserError: several settings for one comparison, or sides with different images.
    """
    selected = [setting for setting in settings if is_about(claim, setting)]
    _check_one_each(claim, selected)
    made, missing = [], []
    for setting, other, task in _pairs(claim, selected, settings):
        what = _what(claim, setting, selected, task)
        tasks = [task] if task else [claim.task] if claim.task else setting.tasks
        found = _differences(claim, (setting, claim.measure), other, tasks)
        if isinstance(found, str):
            missing.append(", ".join(_texts(what)) + ": " + found if what else found)
        else:
            made.append((what, found))
    overall = _overall([found for _, found in made]) if len(made) > 1 else None
    missing = missing if made or missing else ["no such setting in this run"]
    return Judgement(claim, _comparisons(claim, made), missing, overall)


def is_about(claim: Claim, setting: Setting) -> bool:
    """Whether a setting has what `of` says; a list stands for any of its values where the setting itself is no list."""
    found = {"prompt.mode": "none"} | leaves(setting.config)
    return all(
        path in found and (found[path] in value if _is_choice(value, found[path]) else found[path] == value)
        for path, value in leaves(claim.of).items()
    )


def _is_choice(value: Any, found: Any) -> bool:
    return isinstance(value, list) and not isinstance(found, list)


def _comparisons(claim: Claim, made: Sequence[tuple[dict, Differences]]) -> list[Comparison]:
    intervals = [paired_interval(values, 0, clusters) for _, (values, clusters, _) in made]
    adjusted = holm([interval.p for interval in intervals])
    return [
        Comparison(what, interval, float(p), _verdict(claim, interval), counted(clusters, units))
        for (what, (_, clusters, units)), interval, p in zip(made, intervals, adjusted)
    ]


def _overall(found: Sequence[Differences]) -> Interval:
    """The mean over all comparisons' images; what is drawn together stays together, whichever comparison it is in."""
    values, clusters = (np.concatenate([each[n] for each in found]) for n in (0, 1))
    return paired_interval(values, 0, clusters)


def _check_one_each(claim: Claim, selected: Sequence[Setting]) -> None:
    first: dict[str, Setting] = {}
    for setting in selected:
        values = json.dumps([value_at(setting.config, path) for path in claim.each if path != "task"], sort_keys=True)
        one, other = (configuration(each.config) for each in (first.setdefault(values, setting), setting))
        if differing := sorted(path for path in one | other if one.get(path) != other.get(path)):
            raise UserError(
                f"claim {claim.say!r}: several settings match, which differ in {', '.join(differing)}; "
                "say which in `of`, or name it in `each`"
            )


def _pairs(claim: Claim, selected: Sequence[Setting], settings: Sequence[Setting]) -> Iterator[tuple]:
    """Every comparison to be made: a setting, the other side (None where the run has none), and a task or None."""
    for setting in selected:
        other = _other(claim, setting, settings)
        itself = isinstance(claim.against, dict) and other is not None and other[0] is setting
        if not itself:
            yield from ((setting, other, task) for task in (setting.tasks if "task" in claim.each else [None]))


def _other(claim: Claim, setting: Setting, settings: Sequence[Setting]) -> Side | float | None:
    if isinstance(claim.against, str):
        return setting, BESIDE[claim.against][claim.measure]
    if not isinstance(claim.against, dict):
        return float(claim.against or 0)
    wanted = configuration(leaves(setting.config) | leaves(claim.against))
    return next(((other, claim.measure) for other in settings if configuration(other.config) == wanted), None)


def _what(claim: Claim, setting: Setting, selected: Sequence[Setting], task: str | None) -> dict[str, Any]:
    """The values of `each`; of a section, only what differs among the settings."""
    what = {}
    for path in claim.each:
        value = task if path == "task" else value_at(setting.config, path)
        if isinstance(value, dict):
            sections = [value_at(other.config, path) for other in selected]
            value = {key: part for key, part in value.items() if any(other.get(key) != part for other in sections)}
        what[path] = value
    return what


def _differences(claim: Claim, ours: Side, other: Side | float | None, tasks: Sequence[str]) -> Differences | str:
    """The difference on each image, or why there is none."""
    if other is None:
        return "nothing to compare with"
    sides = [ours, other] if isinstance(other, tuple) else [ours]
    if lacking := [task for task in tasks for setting, _ in sides if task not in setting.tasks]:
        return f"no task {lacking[0]}"
    if lacking := [measure for setting, measure in sides if not setting.has(measure)]:
        return f"no {lacking[0]}"
    per_task = [_same_images(claim, sides, task) for task in tasks]
    a, b = (np.concatenate([values[side].values for values in per_task]) for side in (0, -1))
    clusters, units = (
        np.concatenate([getattr(values[0], name) for values in per_task]) for name in ("clusters", "units")
    )
    if len(set(clusters)) < 2:
        return f"one {units[0]} alone"
    if claim.share is not None:
        return claim.share * b - a, clusters, units
    return a - (b if len(sides) == 2 else other), clusters, units


def _same_images(claim: Claim, sides: Sequence[Side], task: str) -> list[Values]:
    """The values of all sides on a task's images; where one is an oracle, on the first images that it has."""
    counts = [len(setting.values(measure, task).ids) for setting, measure in sides]
    limit = min(counts) if any(setting.is_oracle for setting, _ in sides) else None
    values = [setting.values(measure, task, limit) for setting, measure in sides]
    if not np.array_equal(values[0].ids, values[-1].ids):
        raise UserError(f"claim {claim.say!r}: the two sides have different images of task {task!r}")
    return values


def _verdict(claim: Claim, interval: Interval) -> str:
    if claim.within is not None:
        holds = -claim.within <= interval.low and interval.high <= claim.within
        fails = interval.low > claim.within or interval.high < -claim.within
    else:
        bound = claim.at_least or 0.0
        holds = interval.low >= bound if bound else interval.low > 0
        fails = interval.high < bound
    return "true" if holds else "refuted" if fails else "open"


def claims_table(judgements: Sequence[Judgement]) -> str:
    """Markdown: a row for every claim, then a table of its comparisons for every claim that makes several."""
    rows = [[_word(each.verdict), each.claim.say, each.figure, each.images] for each in judgements]
    tables = [_table(["verdict", "claim", "difference, 95 % interval", "on"], rows)]
    tables += [f"{each.claim.say}:\n\n{details_table(each)}" for each in judgements if len(each.comparisons) > 1]
    return "\n\n".join(tables)


def details_table(judgement: Judgement) -> str:
    """Markdown table with a row for every comparison of a claim."""
    head = [*judgement.claim.each, "difference, 95 % interval", "p", "p after Holm", "verdict", "images"]
    rows = [
        [
            *_texts(each.what),
            _figure(judgement.claim, each.interval),
            f"{each.interval.p:.4f}",
            f"{each.holm_p:.4f}",
            _word(each.verdict),
            str(each.interval.n),
        ]
        for each in judgement.comparisons
    ]
    return _table(head, rows)


def _counts(judgement: Judgement) -> str:
    """How many comparisons went which way, and from where to where; "" for none."""
    claim, comparisons = judgement.claim, judgement.comparisons
    if not comparisons:
        return ""
    n, text = len(comparisons), _tally(claim, comparisons)
    if _is_contest(claim):
        firm = Counter(each.verdict for each in comparisons if each.holm_p < 0.05)
        text += f" (after Holm: {firm['true']}, {firm['refuted']}, {n - firm['true'] - firm['refuted']})"
    ends = [pick(each.interval.estimate for each in comparisons) for pick in (min, max)]
    range_ = f"from {_number(claim, ends[0])} to {_number(claim, ends[1])}"
    return f"{text}; {range_}, on average {_figure(claim, judgement.overall)}"


def _tally(claim: Claim, comparisons: Sequence[Comparison]) -> str:
    verdicts = Counter(each.verdict for each in comparisons)
    won, lost = ("wins", "loses") if _is_contest(claim) else ("holds", "refuted")
    counts = f"{won} {verdicts['true']}, {lost} {verdicts['refuted']}, not told apart {verdicts['open']}"
    return f"{counts} of {len(comparisons)}"


def _is_contest(claim: Claim) -> bool:
    """Whether it asks which side is above the other, so that true is a win and refuted a loss."""
    return _is_difference(claim) and claim.within is None and claim.share is None and not claim.at_least


def _is_difference(claim: Claim) -> bool:
    """Whether something is compared, rather than one side measured."""
    return claim.against not in (None, 0)


def _figure(claim: Claim, interval: Interval) -> str:
    """As "-0.10 [-0.30, +0.10] points"."""
    estimate, low, high = (_number(claim, value) for value in interval[:3])
    what = f"{claim.share:g} of theirs less ours " if claim.share is not None else ""
    return f"{what}{estimate} [{low}, {high}]{_unit(claim)}"


def _number(claim: Claim, value: float) -> str:
    """Two decimals of a percentage, so that a bound of -0.34 does not read as -0.3; four of other measures."""
    places = 4 if claim.measure in PLAIN else 2
    rounded = round(value, places) + 0.0  # no "-0.00"
    return f"{rounded:+.{places}f}" if _is_difference(claim) else f"{rounded:.{places}f}"


def _unit(claim: Claim) -> str:
    return "" if claim.measure in PLAIN else " points" if _is_difference(claim) else " %"


def _word(verdict: str) -> str:
    return "not told apart" if verdict == "open" else verdict


def _texts(what: dict[str, Any]) -> list[str]:
    """The values of `each` in words; of a section, its settings."""
    sections = {path: value if isinstance(value, dict) else {"": value} for path, value in what.items()}
    return [
        ", ".join(f"{key} {plain(part, path)}".lstrip() for key, part in section.items())
        for path, section in sections.items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
