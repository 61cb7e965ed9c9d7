"""A search space: points of its grid, draws of its sampled axes, and the trials that these stand for.

At the end stand records as trials of an Optuna study: of a search that goes on from them, and of one that is exported.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from patchrank.config import Constraint, Objective, Rule, SweepConfig, TrialConfig, validate, value_at
from patchrank.config.validation import section_at
from patchrank.io import content_id
from patchrank.report.pareto import is_number, said
from patchrank.trial.check import check_trial, counted_gmacs
from patchrank.trial.requirements import ResolvedTrial
from patchrank.tune.early_stopping import STEP, VALUE
from patchrank.utils.errors import UserError

TRIES = 200  # repeated draws, beyond the number of those known, after which a cell counts as exhausted
ON_STEP = 1e-8  # of a step; what is nearer to one lies on it, as for Optuna
MOST = 2000  # draws in all, for spaces of which bounds leave little


@dataclass
class Cell:
    """One point of the grid: a trial, or a search around it over the sampled axes, which have these rules there."""

    values: dict[str, object]
    samples: int
    sampled: dict[str, Rule] = field(default_factory=dict)

    def holds(self, values: dict[str, object]) -> bool:
        """Whether swept settings are those of a trial of this cell."""
        return self.values.items() <= values.items()


def configure(base: TrialConfig, values: dict[str, object]) -> ResolvedTrial:
    """`base` with settings replaced by path, checked; a mapping changes the keys that it names of a whole section.

    Raises:
        UserError: a value that does not fit its setting, or a trial that cannot run.
    """
    where = ", ".join(f"{path}={value}" for path, value in values.items()) or "trial"
    trial = ResolvedTrial(validate(TrialConfig, replaced(base, values), where))
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
            if place[part] is None:  # a whole section, such as `prompt`
                place[part] = section_at(TrialConfig, part)().model_dump()
            place = place[part]
        whole = isinstance(value, dict) and isinstance(place[last], dict)
        place[last] = {**place[last], **value} if whole else value
    return raw


def grid_points(grid: dict[str, Rule], base: TrialConfig) -> list[dict[str, object]]:
    """Points of the grid, each once; an axis stands only in those that meet its `when`."""
    points: dict[str, dict[str, object]] = {}
    for values in itertools.product(*(rule.grid for rule in grid.values())):
        point, dropped = dict(zip(grid, values)), True
        while dropped:  # an axis that falls may take others with it
            raw = replaced(base, point)
            dropped = [key for key in point if not grid[key].holds(functools.partial(value_at, raw))]
            point = {key: value for key, value in point.items() if key not in dropped}
        points.setdefault(json.dumps(raw, sort_keys=True), point)
    return list(points.values())


def rules_around(point: dict[str, object], sampled: dict[str, Rule], base: TrialConfig) -> dict[str, Rule]:
    """The rules of the sampled axes around a point of the grid, which decides where an axis has several."""
    values = functools.partial(value_at, replaced(base, point))
    return {key: rule.chosen(values) for key, rule in sampled.items()}


def random_points(point: dict[str, object], sampled: dict[str, Rule], config: SweepConfig) -> list[dict[str, object]]:
    """Draws around a point of the grid, each once, in an order that the seed alone decides: a plan like any grid.

    Draws that break a bound on GMACs, which are counted beforehand, are replaced; a small space gives fewer.
    """
    search, base = config.search, config.trial
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
        elif fits(configure(base, values), config.constraints):
            found[name] = values
        seen.add(name)
    return list(found.values())


def fits(trial: ResolvedTrial, bounds: Iterable[Constraint]) -> bool:
    """Whether a trial keeps the bounds on GMACs; where tokens are learned, which add some, nobody knows beforehand."""
    counted = [bound for bound in bounds if bound.metric == "gmacs"]
    if not counted or trial.learns:
        return True
    found = {"gmacs": counted_gmacs(trial)}
    return all(bound.excess(found) <= 0 for bound in counted)


def allows(rule: Rule, value: object) -> bool:
    """Whether a rule may have drawn a value, which may be of a rule that has changed since.

    A number between two steps may not; Optuna would refuse it.
    """
    if rule.kind == "choice":
        return value in rule.choice
    low, high = rule.uniform if rule.kind == "uniform" else rule.int_
    if not isinstance(value, int | float) or not low <= value <= high:
        return False
    steps = 0.0 if rule.step is None else (value - low) / rule.step
    return abs(steps - round(steps)) < ON_STEP


def create_study(**settings) -> optuna.Study:
    """An Optuna study that does not announce itself; its settings are those of `optuna.create_study`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(**settings)


def in_order(rules: dict[str, Rule]) -> dict[str, Rule]:
    """Axes such that each comes after those that its `when` names; otherwise as they stand.

    Raises:
        UserError: axes whose conditions go in a circle.
    """
    names = {key: rule.depends_on & rules.keys() for key, rule in rules.items()}
    ordered: dict[str, Rule] = {}
    while len(ordered) < len(rules):
        ready = [key for key in rules if key not in ordered and names[key] <= ordered.keys()]
        if not ready:
            left = ", ".join(key for key in rules if key not in ordered)
            raise UserError(f"{left}: conditions (when) go in a circle")
        ordered[ready[0]] = rules[ready[0]]
    return ordered


def sample(trial: optuna.Trial, rules: dict[str, Rule], cell: dict[str, object]) -> dict[str, object]:
    """Draws the sampled axes around a cell; one whose `when` is not met is left at its setting."""
    values = dict(cell)
    for key, rule in rules.items():
        if not rule.holds(values.get):
            continue
        if rule.kind == "choice":
            values[key] = json.loads(trial.suggest_categorical(key, distribution(rule).choices))
        elif rule.kind == "uniform":
            drawn = trial.suggest_float(key, *rule.uniform, step=rule.step, log=rule.log)
            values[key] = float(f"{drawn:.10g}")  # steps of 0.1 should read 0.6, not 0.6000000000000001
        else:
            values[key] = trial.suggest_int(key, *rule.int_, step=int(rule.step or 1), log=rule.log)
    return values


def distribution(rule: Rule) -> optuna.distributions.BaseDistribution:
    """Optuna's form of a rule; bounds are inclusive."""
    if rule.kind == "choice":
        return optuna.distributions.CategoricalDistribution([encode(rule, choice) for choice in rule.choice])
    if rule.kind == "uniform":
        return optuna.distributions.FloatDistribution(*rule.uniform, log=rule.log, step=rule.step)
    return optuna.distributions.IntDistribution(*rule.int_, log=rule.log, step=int(rule.step or 1))


def encode(rule: Rule, value: object) -> object:
    """A value as Optuna holds it: choices, which may be lists, as JSON."""
    return json.dumps(value) if rule.kind == "choice" else value


def past_trial(
    record: dict, drawn: Mapping[str, object], rules: Mapping[str, Rule], config: SweepConfig
) -> FrozenTrial:
    """A record as an Optuna trial: with the objectives' values, or with the reason why there are none.

    Args:
        record: of status `ok`, `stopped` or `error`.
        drawn: the values that its sampled axes took, by dotted path.
        rules: of those axes, none of them a grid.
        config: the sweep's, for its objectives and constraints.
    """
    metrics, reached, cause = record.get("metrics", {}), record.get("reached"), _cause(record, config)
    about = {"id": record["id"]} | {key: value for key, value in metrics.items() if is_number(value)}
    if cause is None:
        state, values = TrialState.COMPLETE, [metrics[each.metric] for each in config.objectives]
    else:
        fell_behind = record["status"] == "stopped" and not record.get("by_hand")
        state, values = TrialState.PRUNED if fell_behind else TrialState.FAIL, None
        about["cause"] = cause
    trial = create_trial(
        state=state,
        values=values,
        params={key: encode(rules[key], value) for key, value in drawn.items()},
        distributions={key: distribution(rules[key]) for key in drawn},
        user_attrs=about,
        intermediate_values={reached[STEP]: reached[VALUE]} if reached else None,
        constraints=excesses(metrics, config.constraints) if cause is None else None,
    )
    day = datetime.datetime.fromisoformat(record.get("date", "1970-01-02"))  # all that a record says of time
    trial.datetime_start = trial.datetime_complete = day
    return trial


def _cause(record: dict, config: SweepConfig) -> str | None:
    """Why a trial has no values; None where it has all figures that objectives and constraints ask for."""
    if record["status"] == "stopped" and record.get("by_hand"):
        return "stopped by hand"
    if record["status"] == "stopped":
        return "ended early, since it fell behind others"
    if record["status"] != "ok":
        return record.get("error", "unknown")
    wanted = dict.fromkeys(each.metric for each in (*config.objectives, *config.constraints))
    lacking = [metric for metric in wanted if not is_number(record["metrics"].get(metric))]
    return f"{', '.join(lacking)} could not be measured" if lacking else None


def excesses(metrics: Mapping[str, float], constraints: Sequence[Constraint]) -> dict[str, float]:
    """By how much each constraint is broken, by its text (`gmacs <= 12`). Samplers learn to stay at or below 0."""
    return {said([each]): float(each.excess(metrics)) for each in constraints if is_number(metrics.get(each.metric))}


def directions(objectives: Sequence[Objective]) -> list[str]:
    """Optuna's words for the directions that objectives are to go in."""
    return ["maximize" if objective.mode == "max" else "minimize" for objective in objectives]
