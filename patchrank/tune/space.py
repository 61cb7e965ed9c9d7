"""Points of a search space: the grid, random draws around each of its points, and the trials that these stand for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import optuna

from patchrank.config import Constraint, PromptConfig, Rule, SearchConfig, TrialConfig, known_keys, validate, value_at
from patchrank.io import content_id
from patchrank.trial.check import check_trial, counted_gmacs
from patchrank.trial.prompts import learns
from patchrank.tune.spaces import create_study, sample
from patchrank.utils.errors import UserError

TRIES = 200  # repeated draws, beyond the number of those known, after which a cell counts as exhausted
MOST = 2000  # draws in all, for spaces of which bounds leave little


@dataclass
class Cell:
    """One point of the grid: a trial, or a search over the sampled axes around it."""

    values: dict[str, object]
    samples: int


def configure(base: TrialConfig, values: dict[str, object]) -> TrialConfig:
    """`base` with settings replaced by path; a mapping changes the keys that it names of a whole section.

    Raises:
        UserError: a value that does not fit its setting.
    """
    raw = replaced(base, values)
    where = ", ".join(f"{path}={value}" for path, value in values.items()) or "trial"
    trial = validate(TrialConfig, raw, where)
    try:
        check_trial(trial)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return trial


def replaced(base: TrialConfig, values: dict[str, object]) -> dict:
    """`base` as plain values, with settings replaced by path."""
    raw = base.model_dump()
    for path, value in values.items():
        *parts, last = path.split(".")
        place = raw
        for part in parts:
            place[part] = PromptConfig().model_dump() if place[part] is None else place[part]  # which alone may be null
            place = place[part]
        whole = isinstance(value, dict) and isinstance(place[last], dict)
        place[last] = {**place[last], **value} if whole else value
    return raw


def grid_points(grid: dict[str, Rule], base: TrialConfig) -> list[dict[str, object]]:
    """Points of the grid, each once; an axis stands only in those that meet its `when`."""
    points: dict[str, dict[str, object]] = {}
    for values in itertools.product(*(rule.grid for rule in grid.values())):
        point = _standing(dict(zip(grid, values)), grid, base)
        points.setdefault(json.dumps(replaced(base, point), sort_keys=True), point)
    return list(points.values())


def _standing(point: dict[str, object], grid: dict[str, Rule], base: TrialConfig) -> dict[str, object]:
    """The axes of a point whose `when` is met; an axis that falls may take others with it."""
    raw = replaced(base, point)
    left = {key: value for key, value in point.items() if _meets(key, grid[key], raw)}
    return left if left == point else _standing(left, grid, base)


def _meets(key: str, rule: Rule, raw: dict) -> bool:
    for path in (path for each in rule.conditions for path in each):
        *parents, last = path.split(".")
        if last not in known_keys(TrialConfig, tuple(parents)):
            raise UserError(f"{key}: when names {last!r}, which is no setting of a trial")
    return rule.holds(lambda path: value_at(raw, path))


def random_points(
    point: dict[str, object],
    sampled: dict[str, Rule],
    base: TrialConfig,
    search: SearchConfig,
    bounds: Sequence[Constraint],
) -> list[dict[str, object]]:
    """Draws around a point of the grid, each once, in an order that the seed alone decides: a plan like any grid.

    Draws that break a bound on GMACs, which are counted beforehand, are replaced; a small space gives fewer.
    """
    seed = int(content_id([search.seed, point])[:8], 16)
    study = create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found: dict[str, dict[str, object]] = {}
    seen: set[str] = set()
    repeated = 0
    for _ in range(MOST + search.samples):
        if len(found) == search.samples or repeated > TRIES + len(seen):
            break
        values = sample(study.ask(), sampled, point)
        name = json.dumps(replaced(base, values), sort_keys=True)
        if name in seen:
            repeated += 1
        elif fits(configure(base, values), bounds):
            found[name] = values
        seen.add(name)
    return list(found.values())


def fits(trial: TrialConfig, bounds: Iterable[Constraint]) -> bool:
    """Whether a trial keeps the bounds on GMACs; where tokens are learned, which add some, nobody knows beforehand."""
    counted = [bound for bound in bounds if bound.metric == "gmacs"]
    if not counted or learns(trial):
        return True
    gmacs = counted_gmacs(trial)
    return all(bound.excess({"gmacs": gmacs}) <= 0 for bound in counted)


def allows(rule: Rule, value: object, others: dict[str, object]) -> bool:
    """Whether a rule may have drawn a value, beside the values of other axes."""
    if not rule.holds(others.get):
        return False
    if rule.kind == "choice":
        return value in rule.choice
    low, high = rule.uniform if rule.kind == "uniform" else rule.int_
    return isinstance(value, int | float) and low <= value <= high
