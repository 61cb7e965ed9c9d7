"""What the claims of a sweep file compare: which settings, on which images, and the differences between them.

A difference is per image and paired, averaged over seeds. Its interval draws whole digits, groups or images, whichever
the data is drawn by (`utils.stats.paired_interval`). `judgement.py` says what a difference means for a claim.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from patchrank.config import BESIDE, Claim, leaves, value_at
from patchrank.report.judgement import Comparison, Judgement, values_in_words, verdict_of
from patchrank.report.labels import LOCATIONS, counted, layers, plain, ranking
from patchrank.report.results import Setting, Values, configuration, joined
from patchrank.utils.errors import UserError
from patchrank.utils.stats import holm, paired_interval

Side = tuple[Setting, str]  # a setting and the measure that is taken of it


class Pair(NamedTuple):
    """One comparison to be made.

    other: the other side, a number, or None where the run has no such setting. task: None for all tasks at once. name:
    what the other side is called, where a claim sets several against one.
    """

    setting: Setting
    other: Side | float | None
    task: str | None
    name: str | None = None


def judge(claim: Claim, settings: Sequence[Setting]) -> Judgement:
    """Compares the settings that a claim is about with what it sets them against.

    A partner is the setting whose configuration is the same but for what `against` changes; under `match` every setting
    that has what `against` says, and shares with this one what `match` names. Where a partner is the setting itself,
    nothing is compared. An oracle's subset is compared with the same images of the other side.

    Raises:
        UserError: several settings for one comparison, or sides with different images.
    """
    selected = [setting for setting in settings if is_about(claim, setting)]
    made, missing = [], []
    for pair in pair_up(claim, selected, settings):
        what, found = _what(claim, pair, selected), _differences(claim, pair)
        if isinstance(found, Values):
            made.append((what, found))
        else:
            missing.append(f"{', '.join(values_in_words(what))}: {found}" if what else found)
    if not made and not missing:
        missing = ["no such setting in this run"]
    intervals = [paired_interval(found.values, 0, found.clusters) for _, found in made]
    adjusted = holm([interval.p for interval in intervals])
    comparisons = [
        Comparison(what, interval, float(p), verdict_of(claim, interval), counted(found))
        for (what, found), interval, p in zip(made, intervals, adjusted)
    ]
    every = joined(found for _, found in made) if len(made) > 1 else None
    # images that are drawn together stay together, whichever comparison they are in
    overall = every and paired_interval(every.values, 0, every.clusters)
    return Judgement(claim, comparisons, missing, overall)


def is_about(claim: Claim, setting: Setting) -> bool:
    """Whether a setting has what `of` says. A list stands for any of its values where the setting itself is no list."""
    found = {"prompt.mode": "none"} | leaves(setting.config)
    for path, value in leaves(claim.of).items():
        is_choice = isinstance(value, list) and not isinstance(found.get(path), list)
        if path not in found or found[path] not in (value if is_choice else [value]):
            return False
    return True


def pair_up(claim: Claim, selected: Sequence[Setting], settings: Sequence[Setting]) -> list[Pair]:
    """Every comparison that a claim asks for, of the settings that it is about (`selected`) with others.

    Raises:
        UserError: several settings for one comparison.
    """
    pairs, first = [], {}
    for setting in selected:
        values = json.dumps([value_at(setting.config, path) for path in claim.each if path != "task"], sort_keys=True)
        one, two = configuration(first.setdefault(values, setting).config), configuration(setting.config)
        if differing := sorted(path for path in one | two if one.get(path) != two.get(path)):
            raise UserError(
                f"claim {claim.say!r}: several settings match, which differ in {', '.join(differing)}; "
                "say which in `of`, or name it in `each`"
            )
        tasks = setting.tasks if "task" in claim.each else [None]
        if claim.match is not None:
            partners = _partners(claim, setting, settings)
            pairs += [Pair(setting, other, task, name) for other, name in partners for task in tasks]
            continue
        other = _other(claim, setting, settings)
        is_itself = isinstance(claim.against, dict) and other is not None and other[0] is setting
        if not is_itself:
            pairs += [Pair(setting, other, task) for task in tasks]
    return pairs


def _partners(claim: Claim, setting: Setting, settings: Sequence[Setting]) -> list[tuple[Side | None, str | None]]:
    """Every other setting that `against` and `match` allow, with its name; one None where there is none."""
    shared = {path: value_at(setting.config, path) for path in claim.match or ()}
    wanted = claim.model_copy(update={"of": claim.against})
    found = []
    for other in settings:
        alike = all(value_at(other.config, path) == value for path, value in shared.items())
        if other is not setting and alike and is_about(wanted, other):
            merges = ", the rest merges" if other.config["pruning"]["leftovers"] == "merge" else ""
            where = layers(plain(other.config["pruning"]["locations"], LOCATIONS))
            found.append(((other, claim.measure), f"{ranking(other)}{merges}, {where}"))
    return found or [(None, None)]


def _other(claim: Claim, setting: Setting, settings: Sequence[Setting]) -> Side | float | None:
    if isinstance(claim.against, str):
        return setting, BESIDE[claim.against][claim.measure]
    if not isinstance(claim.against, dict):
        return float(claim.against or 0)
    wanted = configuration(leaves(setting.config) | leaves(claim.against))
    return next(((other, claim.measure) for other in settings if configuration(other.config) == wanted), None)


def _what(claim: Claim, pair: Pair, selected: Sequence[Setting]) -> dict[str, Any]:
    """The values of `each`; of a section, only what differs among the settings."""
    what = {}
    for path in claim.each:
        value = pair.task if path == "task" else value_at(pair.setting.config, path)
        if isinstance(value, dict):
            sections = [value_at(other.config, path) for other in selected]
            value = {key: part for key, part in value.items() if any(other.get(key) != part for other in sections)}
        what[path] = value
    return what if pair.name is None else what | {"against": pair.name}


def _differences(claim: Claim, pair: Pair) -> Values | str:
    """The difference on each image, or why there is none."""
    if pair.other is None:
        return "nothing to compare with"
    ours = pair.setting, claim.measure
    sides = [ours, pair.other] if isinstance(pair.other, tuple) else [ours]
    task = pair.task or claim.task
    tasks = [task] if task else pair.setting.tasks
    if lacking := [task for task in tasks for setting, _ in sides if task not in setting.tasks]:
        return f"no task {lacking[0]}"
    if lacking := [measure for setting, measure in sides if not setting.has(measure)]:
        return f"no {lacking[0]}"
    per_task = [_same_images(claim, sides, task) for task in tasks]
    a, b = (joined(values[side] for values in per_task) for side in (0, -1))
    if len(set(a.clusters)) < 2:
        return f"one {a.units[0]} alone"
    if claim.share is not None:
        return a._replace(values=claim.share * b.values - a.values)
    return a._replace(values=a.values - (b.values if len(sides) == 2 else pair.other))


def _same_images(claim: Claim, sides: Sequence[Side], task: str) -> list[Values]:
    """The values of all sides on a task's images; where one is an oracle, on the first images that it has."""
    counts = [len(setting.values(measure, task).ids) for setting, measure in sides]
    limit = min(counts) if any(setting.is_oracle for setting, _ in sides) else None
    values = [setting.values(measure, task, limit) for setting, measure in sides]
    if not np.array_equal(values[0].ids, values[-1].ids):
        raise UserError(f"claim {claim.say!r}: the two sides have different images of task {task!r}")
    return values
