"""A judged claim: true, refuted, not told apart or not measured, and the figures and sentences that say so."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from patchrank.config import Claim
from patchrank.report.labels import plain
from patchrank.report.markdown import signed, table
from patchrank.utils.stats import Interval

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
    """A claim with its comparisons. `missing` says for every comparison that could not be made why not.

    p values are for a difference of 0, whatever the claim allows. Holm corrects them over the comparisons of this
    claim. overall: the difference over the images of all comparisons, where there are several.
    """

    claim: Claim
    comparisons: list[Comparison]
    missing: list[str]
    overall: Interval | None = None

    @property
    def verdict(self) -> str:
        """true (everywhere), refuted (anywhere), open or not measured. Where a part is missing, no claim is true.

        One loss among many may be luck: of a contest with several comparisons only a loss that stands after Holm
        refutes.
        """
        if not self.comparisons:
            return "not measured"
        luck_is_likely = (is_contest(self.claim) or self.claim.not_behind) and len(self.comparisons) > 1
        if any(each.verdict == "refuted" and (each.holm_p < 0.05 or not luck_is_likely) for each in self.comparisons):
            return "refuted"
        all_hold = all(each.verdict == "true" for each in self.comparisons)
        return "true" if all_hold and not self.missing else "open"

    @property
    def figure(self) -> str:
        """The difference with its interval, or how many of several went which way; and what is missing."""
        found = ""
        if len(self.comparisons) == 1:
            found = difference_text(self.claim, self.comparisons[0].interval)
        elif self.comparisons:
            found = self._tally()
            if is_contest(self.claim):
                firm = Counter(each.verdict for each in self.comparisons if each.holm_p < 0.05)
                rest = len(self.comparisons) - firm["true"] - firm["refuted"]
                found += f" (after Holm: {firm['true']}, {firm['refuted']}, {rest})"
            estimates = [each.interval.estimate for each in self.comparisons]
            low, high = (_number(self.claim, value) for value in (min(estimates), max(estimates)))
            found += f"; from {low} to {high}, on average {difference_text(self.claim, self.overall)}"
        missing = ", ".join(self.missing)
        return f"{found}; not measured: {missing}" if found and missing else found or missing

    @property
    def headline(self) -> tuple[str, str]:
        """What an index says: verdict and sentence, with how often it holds of several; and one figure."""
        said = f"**{word(self.verdict)}**: {self.claim.say}"
        if len(self.comparisons) < 2:
            return said, self.figure
        return f"{said}: {self._tally()}", f"on average {difference_text(self.claim, self.overall)}"

    def line(self) -> str:
        """Verdict, sentence, figure and images as one line of Markdown."""
        sizes = sorted({(each.interval.n, each.interval.clusters, each.images) for each in self.comparisons})
        images = " to ".join(dict.fromkeys(each[-1] for each in sizes[:1] + sizes[-1:]))
        return f"**{word(self.verdict)}**: {self.claim.say}: {'; '.join(filter(None, [self.figure, images]))}"

    def details(self) -> str:
        """Markdown table with a row for every comparison."""
        against = ["against"] if self.claim.match is not None else []
        head = [*self.claim.each, *against, "difference, 95 % interval", "p", "p after Holm", "verdict", "images"]
        rows = []
        for each in self.comparisons:
            texts = [text.replace("|", "\\|") for text in values_in_words(each.what)]
            texts += [difference_text(self.claim, each.interval), f"{each.interval.p:.4f}", f"{each.holm_p:.4f}"]
            rows.append([*texts, word(each.verdict), str(each.interval.n)])
        return table(head, rows, texts=len(head))

    def to_json(self) -> dict[str, Any]:
        """As it stands in `claims.json`."""
        comparisons = []
        for each in self.comparisons:
            judged = {"holm_p": each.holm_p, "verdict": each.verdict, "images": each.images}
            comparisons.append({"what": each.what, **each.interval._asdict(), **judged})
        return {
            "claim": self.claim.model_dump(exclude_unset=True),
            "verdict": self.verdict,
            "comparisons": comparisons,
            "missing": self.missing,
            "overall": self.overall and self.overall._asdict(),
        }

    def _tally(self) -> str:
        verdicts = Counter(each.verdict for each in self.comparisons)
        won, lost = ("wins", "loses") if is_contest(self.claim) else ("holds", "refuted")
        counts = f"{won} {verdicts['true']}, {lost} {verdicts['refuted']}, not told apart {verdicts['open']}"
        return f"{counts} of {len(self.comparisons)}"


def verdict_of(claim: Claim, interval: Interval) -> str:
    """What an interval says of a claim: true, refuted or open."""
    if claim.not_behind:
        holds, fails = interval.high >= 0, interval.high < 0
    elif claim.within is not None:
        holds = -claim.within <= interval.low and interval.high <= claim.within
        fails = interval.low > claim.within or interval.high < -claim.within
    else:
        bound = claim.at_least or 0.0
        holds = interval.low >= bound if bound else interval.low > 0
        fails = interval.high < bound
    return "true" if holds else "refuted" if fails else "open"


def is_contest(claim: Claim) -> bool:
    """Whether a claim asks which side is above the other, so that true is a win and refuted a loss."""
    rules = (claim.within is not None, claim.share is not None, claim.at_least, claim.not_behind)
    return _compares(claim) and not any(rules)


def _compares(claim: Claim) -> bool:
    """Whether something is compared, rather than one side measured."""
    return claim.against not in (None, 0)


def difference_text(claim: Claim, interval: Interval) -> str:
    """A difference with its interval and unit, as "-0.10 [-0.30, +0.10] points"."""
    estimate, low, high = (_number(claim, value) for value in interval[:3])
    unit = "" if claim.measure in PLAIN else " points" if _compares(claim) else " %"
    what = "" if claim.share is None else f"{claim.share:g} of theirs less ours "
    return f"{what}{estimate} [{low}, {high}]{unit}"


def _number(claim: Claim, value: float) -> str:
    """Two decimals of a percentage, so that a bound of -0.34 does not read as -0.3; four of other measures."""
    text = signed(value, 4 if claim.measure in PLAIN else 2)
    return text if _compares(claim) else text.removeprefix("+")


def word(verdict: str) -> str:
    return "not told apart" if verdict == "open" else verdict


def values_in_words(what: dict[str, Any]) -> list[str]:
    """The values of `each` as a reader sees them; a section is told by its settings."""
    texts = []
    for path, value in what.items():
        section = value if isinstance(value, dict) else {"": value}
        texts.append(", ".join(f"{key} {plain(part, path)}".lstrip() for key, part in section.items()))
    return texts
