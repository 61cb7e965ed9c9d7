"""Rules of sampled axes, as Optuna has them: what a rule draws, and what it may have drawn."""

from __future__ import annotations

import json

import optuna

from patchrank.config import Rule
from patchrank.utils.errors import UserError


def create_study(**settings) -> optuna.Study:
    """An Optuna study that does not announce itself; its settings are those of `optuna.create_study`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(**settings)


def in_order(rules: dict[str, Rule]) -> dict[str, Rule]:
    """Axes such that each comes after those that its `when` names; otherwise as they stand.

    Raises:
        UserError: axes whose conditions go in a circle.
    """
    names = {key: {path for each in rule.conditions for path in each} & rules.keys() for key, rule in rules.items()}
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
        if rule.holds(values.get):
            values[key] = _draw(trial, key, rule)
    return values


def _draw(trial: optuna.Trial, key: str, rule: Rule) -> object:
    if rule.kind == "choice":
        return json.loads(trial.suggest_categorical(key, distribution(rule).choices))
    if rule.kind == "uniform":
        drawn = trial.suggest_float(key, *rule.uniform, step=rule.step, log=rule.log)
        return float(f"{drawn:.10g}")  # steps of 0.1 should read 0.6, not 0.6000000000000001
    return trial.suggest_int(key, *rule.int_, step=int(rule.step or 1), log=rule.log)


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
