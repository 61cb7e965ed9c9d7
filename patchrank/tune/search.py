"""What to try next. Nothing here is the truth: records are, so that a killed driver loses nothing.

A plan whose trials are all known beforehand is worked off in order. Around sampled axes Optuna searches, with one study
per cell of the grid, in memory and rebuilt from records at every start.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher

from patchrank.config import SearchConfig
from patchrank.io import content_id
from patchrank.tune.console import Failure, describe, say
from patchrank.tune.early_stopping import STEP, VALUE, was_stopped
from patchrank.tune.plan import Plan
from patchrank.tune.space import MOST, TRIES, create_study, distribution, encode, fits, sample

STUBBORN = 8  # repeated proposals in a row after which a trial is drawn at random
EMPTY: Mapping = MappingProxyType({})


def create_sampler(search: SearchConfig, seed: int, num_known: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of a search; NSGA-II's first generation, which is random, is a quarter of the samples.

    Args:
        num_known: how many trials a study is told from records before it is asked for its first one.
    """
    if search.sampler == "nsga2":
        return ReplayedNSGAII(seed, max(4, min(50, search.samples // 4)), num_known)
    return optuna.samplers.TPESampler(seed=seed)


class ReplayedNSGAII(optuna.samplers.NSGAIISampler):
    """NSGA-II on a study that begins with trials from records.

    Modifications: generations are kept here by number of trial. Optuna's own sampler keeps them inside of trials, where
    those from records have none, so that nothing would ever be bred from them.
    """

    def __init__(self, seed: int, population_size: int, num_known: int):
        super().__init__(seed=seed, population_size=population_size)
        self.generations = {number: number // population_size for number in range(num_known)}

    def get_trial_generation(self, study: optuna.Study, trial: FrozenTrial) -> int:
        """The generation of a trial; a new one belongs to the newest, or to the next where that is complete."""
        if trial.number not in self.generations:
            sizes = Counter(self.generations.get(each.number, -1) for each in _complete(study))
            newest = max([0, *sizes])  # -1 are those that were drawn by chance, without this sampler
            self.generations[trial.number] = newest + (sizes[newest] >= self.population_size)
        return self.generations[trial.number]

    def get_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return [trial for trial in _complete(study) if self.generations.get(trial.number) == generation]


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def create_search(
    plan: Plan, failed: Mapping[str, Failure] = EMPTY, lost: Mapping[str, dict[str, object]] = EMPTY
) -> Searcher:
    """The search that a plan asks for.

    Args:
        failed: by id, what failed in this very run of the driver, and has had its turn.
        lost: by id, values of trials whose worker was lost in this run, and that come first.
    """
    return CellSearch(plan, failed, lost) if plan.sampled else ListSearch(plan, failed)


class ListSearch(Searcher):
    """Suggests the trials of a plan that have no record yet, in order."""

    def __init__(self, plan: Plan, failed: Mapping[str, Failure] = EMPTY):
        super().__init__(metric=plan.sweep.config.objectives[0].metric, mode=plan.sweep.config.objectives[0].mode)
        ids = [None if plan.sampled else plan.identify(plan.trial(cell.values)) for cell in plan.cells]
        self.left = deque(cell.values for cell, id_ in zip(plan.cells, ids) if not (plan.record(id_) or id_ in failed))

    def suggest(self, trial_id: str) -> dict | str:
        return {"values": self.left.popleft()} if self.left else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Ray may take its snapshots, but records are what a later run starts from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


class CellSearch(ListSearch):
    """Asks one Optuna study per cell, round-robin over cells, for trials that have no record yet."""

    def __init__(
        self, plan: Plan, failed: Mapping[str, Failure] = EMPTY, lost: Mapping[str, dict[str, object]] = EMPTY
    ):
        super().__init__(plan)
        self.plan, self.failed = plan, failed
        self.objectives = plan.sweep.config.objectives
        self.constraints = plan.sweep.config.constraints
        self.known = [list(plan.records_of(cell)) for cell in plan.cells]
        self.studies = [self._study(n) for n in range(len(plan.cells))]
        self.chance = optuna.samplers.RandomSampler(seed=plan.sweep.config.search.seed + sum(map(len, self.known)))
        self.ids: list[list[str]] = [[] for _ in plan.cells]  # of every cell, finished or under way, in order
        self.live: dict[str, tuple[int, optuna.Trial, str]] = {}  # by Ray's trial id: cell, Optuna's trial, ours
        self.measured: dict[str, dict] = {}  # metrics by id
        self._replay()
        again = [values for values, record in self.plan.failures() if record["id"] not in failed]
        self._enqueue([*lost.values(), *again])  # the latter are of earlier runs

    def _study(self, cell: int) -> optuna.Study:
        """A study whose draws do not begin again where earlier runs of the sweep began."""
        search = self.plan.sweep.config.search
        directions = ["maximize" if objective.mode == "max" else "minimize" for objective in self.objectives]
        seed = int(content_id([search.seed, cell, len(self.known[cell])])[:8], 16)
        return create_study(sampler=create_sampler(search, seed, len(self.known[cell])), directions=directions)

    def _enqueue(self, first: Iterable[dict[str, object]]) -> None:
        """Lets studies begin with values that have been drawn before."""
        rules = self.plan.sampled
        for values in first:
            for n in self._cells_of(values):
                self.studies[n].enqueue_trial({key: encode(rules[key], values[key]) for key in rules if key in values})

    def _cells_of(self, values: dict[str, object]) -> list[int]:
        return [n for n, cell in enumerate(self.plan.cells) if cell.values.items() <= values.items()]

    def _replay(self) -> None:
        """Tells every study what records know of its cell; what failed in this run has had its turn."""
        for identity, failure in self.failed.items():
            for n in self._cells_of(failure.values):
                self.ids[n].append(identity)
        for n, known in enumerate(self.known):
            for record, drawn in known:
                self.studies[n].add_trial(self._past(record, drawn))
                self.ids[n].append(record["id"])
                self.measured[record["id"]] = record["metrics"]

    def _past(self, record: dict, drawn: dict[str, object]) -> FrozenTrial:
        values, reached = self._values(record["metrics"]), record.get("reached")
        is_pruned = reached is not None and len(self.objectives) == 1
        unfinished = TrialState.PRUNED if is_pruned else TrialState.FAIL
        trial = create_trial(
            params={key: encode(self.plan.sampled[key], value) for key, value in drawn.items()},
            distributions={key: distribution(self.plan.sampled[key]) for key in drawn},
            values=values,
            intermediate_values={reached[STEP]: reached[VALUE]} if is_pruned else None,
            state=unfinished if values is None else TrialState.COMPLETE,
        )
        self._bound(trial, record["metrics"])
        return trial

    def suggest(self, trial_id: str) -> dict | str:
        for n in sorted(range(len(self.ids)), key=lambda n: len(self.ids[n])):
            if len(self.ids[n]) >= self.plan.cells[n].samples:
                continue
            asked, identity, values = self._ask(n)
            if identity is None:
                self._exhaust(n)
                continue
            self.ids[n].append(identity)
            self.live[trial_id] = n, asked, identity
            return {"values": values}
        return Searcher.FINISHED

    def _exhaust(self, n: int) -> None:
        """Lowers what is asked of a cell to what there is in it."""
        cell, there = self.plan.cells[n], len(self.ids[n])
        say(f"  note: {describe(cell.values)}: the space gives {there} of {cell.samples} trials that keep its bounds")
        cell.samples = there

    def _ask(self, n: int) -> tuple[optuna.Trial | None, str | None, dict]:
        """A configuration of cell n that is not among its ids and may keep the bounds.

        Samplers repeat themselves, above all while what they have proposed is not measured yet: then chance has a word.
        """
        repeated, study = 0, self.studies[n]
        for _ in range(MOST):
            sampler = study.sampler
            study.sampler = sampler if repeated < STUBBORN else self.chance
            asked = study.ask()
            values = sample(asked, self.plan.sampled, self.plan.cells[n].values)
            study.sampler = sampler
            trial = self.plan.trial(values)
            identity = self.plan.identify(trial)
            if identity not in self.ids[n] and fits(trial, self.constraints):
                return asked, identity, values
            self._tell(n, asked, self.measured.get(identity))
            repeated += identity in self.ids[n]
            if repeated > TRIES + len(self.ids[n]):
                break
        return None, None, {}

    def _tell(self, n: int, asked: optuna.Trial, metrics: dict | None) -> None:
        values = self._values(metrics or {})
        if values is None and len(self.objectives) == 1 and was_stopped(metrics or {}):
            asked.report(metrics[VALUE], metrics[STEP])
            self.studies[n].tell(asked, state=TrialState.PRUNED)
        elif values is None:
            self.studies[n].tell(asked, state=TrialState.FAIL)
        else:
            self._bound(asked, metrics)
            self.studies[n].tell(asked, values)

    def _values(self, metrics: dict) -> list[float] | None:
        """The objectives' values; None if one of them is missing or not a number."""
        values = [metrics.get(objective.metric) for objective in self.objectives]
        return None if any(value is None or math.isnan(value) for value in values) else values

    def _bound(self, trial: optuna.Trial | optuna.trial.FrozenTrial, metrics: dict) -> None:
        """Notes by how much a trial breaks the bounds; samplers learn to stay within them."""
        for bound in self.constraints:
            if bound.metric in metrics:
                trial.set_constraint(bound.metric, bound.excess(metrics))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        n, asked, identity = self.live.pop(trial_id)
        result = None if error or not result or "failure" in result else result
        if result is not None:
            self.measured[identity] = result
            if self.plan.speeds is not None and "id" in result:
                return  # its milliseconds come after the round, and until then it counts as under way
        self._tell(n, asked, result)
