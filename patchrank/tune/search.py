"""What to try next: one Optuna study per cell of the grid, in memory, rebuilt from records at every start.

Ray asks, this answers. Nothing here is the truth: records are, so that a killed driver loses nothing.
"""

from __future__ import annotations

import json
import math

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from patchrank.config import Rule
from patchrank.files import content_id
from patchrank.tune.plan import Plan

TRIES = 50  # asks for something new before a cell counts as exhausted


class CellSearch(Searcher):
    """Suggests trials that have no record yet, round-robin over cells."""

    def __init__(self, plan: Plan):
        objectives = plan.sweep.config.objectives
        super().__init__(metric=objectives[0].metric, mode=objectives[0].mode)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.plan = plan
        self.objectives = objectives
        self.known = [list(plan.records_of(cell)) for cell in plan.cells]
        self.studies = [self._study(n) for n in range(len(plan.cells))]
        self.ids: list[list[str]] = [[] for _ in plan.cells]  # of every cell, finished or under way, in order
        self.live: dict[str, tuple[int, int]] = {}  # Ray's trial id -> cell, number in its study
        self._replay()

    def _study(self, cell: int) -> optuna.Study:
        """A study whose draws do not begin again where earlier runs of the sweep began."""
        search = self.plan.sweep.config.search
        sampler = optuna.samplers.TPESampler if search.method == "optuna" else optuna.samplers.RandomSampler
        directions = ["maximize" if objective.mode == "max" else "minimize" for objective in self.objectives]
        seed = int(content_id([search.seed, cell, len(self.known[cell])])[:8], 16)
        return optuna.create_study(sampler=sampler(seed=seed), directions=directions)

    def _replay(self) -> None:
        """Tells every study what records know of its cell."""
        for n, known in enumerate(self.known):
            for record, drawn in known:
                distributions = {key: distribution(self.plan.sampled[key]) for key in drawn}
                params = {key: encode(self.plan.sampled[key], value) for key, value in drawn.items()}
                values = self._values(record["metrics"])
                state = TrialState.FAIL if values is None else TrialState.COMPLETE
                self.studies[n].add_trial(
                    optuna.trial.create_trial(params=params, distributions=distributions, values=values, state=state)
                )
                self.ids[n].append(record["id"])

    def suggest(self, trial_id: str) -> dict | str | None:
        order = sorted(range(len(self.ids)), key=lambda n: len(self.ids[n]))
        for n in order:
            if len(self.ids[n]) >= self.plan.cells[n].samples:
                continue
            number, identity, values = self._ask(n)
            if identity is None:
                self.plan.cells[n].samples = len(self.ids[n])  # exhausted
                continue
            self.ids[n].append(identity)
            self.live[trial_id] = n, number
            return {"values": values}
        return Searcher.FINISHED

    def _ask(self, n: int) -> tuple[int, str | None, dict]:
        """A configuration of cell n that is not among its ids: Optuna repeats itself on discrete axes."""
        for _ in range(TRIES + len(self.ids[n])):
            asked = self.studies[n].ask()
            values = sample(asked, self.plan.sampled, self.plan.cells[n].values)
            identity = self.plan.identify(self.plan.trial(values))
            if identity not in self.ids[n]:
                return asked.number, identity, values
            record = self.plan.record(identity)
            self._tell(n, asked.number, record and record["metrics"])
        return -1, None, {}

    def _tell(self, n: int, number: int, metrics: dict | None) -> None:
        values = self._values(metrics or {})
        if values is None:
            self.studies[n].tell(number, state=TrialState.FAIL)
        else:
            self.studies[n].tell(number, values)

    def _values(self, metrics: dict) -> list[float] | None:
        """The objectives' values; None if one of them is missing or not a number."""
        values = [metrics.get(objective.metric) for objective in self.objectives]
        return None if any(value is None or math.isnan(value) for value in values) else values

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        pass

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        n, number = self.live.pop(trial_id)
        self._tell(n, number, None if error else result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Ray may take its snapshots, but records are what a later run starts from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


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
