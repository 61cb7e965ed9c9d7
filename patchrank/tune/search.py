"""What to try next. Nothing here is the truth: records are, so that a killed driver loses nothing.

A plan whose trials are all known beforehand is worked off in order. Around sampled axes Optuna searches, with one study
per cell of the grid, in memory and rebuilt from records at every start.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from patchrank.config import SearchConfig
from patchrank.io import content_id
from patchrank.report.pareto import is_number
from patchrank.tune.console import Failure, describe, say
from patchrank.tune.early_stopping import STEP, VALUE, was_stopped
from patchrank.tune.plan import Plan
from patchrank.tune.space import MOST, TRIES, create_study, encode, fits, sample
from patchrank.tune.studies import directions, excesses, past_trial

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
            newest = max([0, *sizes])  # -1 stands for trials that were drawn by chance, without this sampler
            is_complete = sizes[newest] >= self.population_size
            self.generations[trial.number] = newest + 1 if is_complete else newest
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
        failed: by id, trials that failed in this run of the driver, and are not tried again in it.
        lost: by id, values of trials whose worker was lost in this run, and that come first.
    """
    return CellSearch(plan, failed, lost) if plan.sampled else ListSearch(plan, failed)


class _RecordedSearch(Searcher):
    """A search whose state is in records, so that Ray's snapshots of it hold nothing."""

    def __init__(self, plan: Plan):
        first = plan.sweep.config.objectives[0]
        super().__init__(metric=first.metric, mode=first.mode)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class ListSearch(_RecordedSearch):
    """Suggests the trials of a plan that have no record yet, in order."""

    def __init__(self, plan: Plan, failed: Mapping[str, Failure] = EMPTY):
        super().__init__(plan)
        ids = [plan.identify(plan.trial(cell.values)) for cell in plan.cells]
        is_left = [id_ not in failed and not plan.record(id_) for id_ in ids]
        self.left = deque(cell.values for cell, left in zip(plan.cells, is_left) if left)

    def suggest(self, trial_id: str) -> dict | str:
        return {"values": self.left.popleft()} if self.left else Searcher.FINISHED


class CellSearch(_RecordedSearch):
    """Asks one Optuna study per cell for trials that have no record yet, the cell with the fewest trials first."""

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
        failed_before = [values for values, record in self.plan.failures() if record["id"] not in failed]
        self._enqueue([*lost.values(), *failed_before])

    def _study(self, cell: int) -> optuna.Study:
        """A study whose draws do not begin again where earlier runs of the sweep began."""
        search = self.plan.sweep.config.search
        seed = int(content_id([search.seed, cell, len(self.known[cell])])[:8], 16)
        sampler = create_sampler(search, seed, len(self.known[cell]))
        return create_study(sampler=sampler, directions=directions(self.objectives))

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
                past = past_trial(record, drawn, self.plan.sampled, self.objectives, self.constraints)
                if past.state == TrialState.PRUNED and len(self.objectives) > 1:
                    past.state = TrialState.FAIL  # Optuna compares what was ended early by one objective alone
                self.studies[n].add_trial(past)
                self.ids[n].append(record["id"])
                self.measured[record["id"]] = record["metrics"]

    def suggest(self, trial_id: str) -> dict | str:
        for n in sorted(range(len(self.ids)), key=lambda n: len(self.ids[n])):
            if len(self.ids[n]) >= self.plan.cells[n].samples:
                continue
            found = self._ask(n)
            if found is None:
                self._exhaust(n)
                continue
            asked, identity, values = found
            self.ids[n].append(identity)
            self.live[trial_id] = n, asked, identity
            return {"values": values}
        return Searcher.FINISHED

    def _exhaust(self, n: int) -> None:
        """Lowers the number of trials that a cell is to have to what its space gives."""
        cell, there = self.plan.cells[n], len(self.ids[n])
        say(f"  note: {describe(cell.values)}: the space gives {there} of {cell.samples} trials that keep its bounds")
        cell.samples = there

    def _ask(self, n: int) -> tuple[optuna.Trial, str, dict[str, object]] | None:
        """A new configuration of cell n that may keep the bounds, or None: Optuna's trial, our id, and values.

        Samplers repeat themselves, above all while what they have proposed is not measured yet. After `STUBBORN`
        repetitions the next one is drawn at random.
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
            is_known = identity in self.ids[n]
            if not is_known and fits(trial, self.constraints):
                return asked, identity, values
            self._tell(n, asked, self.measured.get(identity))
            if is_known:
                repeated += 1
            if repeated > TRIES + len(self.ids[n]):
                break
        return None

    def _tell(self, n: int, asked: optuna.Trial, metrics: dict | None) -> None:
        """Tells a study what became of a trial; without metrics, or without one of its objectives, it failed."""
        metrics = metrics or {}
        if all(is_number(metrics.get(objective.metric)) for objective in self.objectives):
            for name, excess in excesses(metrics, self.constraints).items():
                asked.set_constraint(name, excess)
            self.studies[n].tell(asked, [metrics[objective.metric] for objective in self.objectives])
        elif was_stopped(metrics) and len(self.objectives) == 1:
            asked.report(metrics[VALUE], metrics[STEP])
            self.studies[n].tell(asked, state=TrialState.PRUNED)
        else:
            self.studies[n].tell(asked, state=TrialState.FAIL)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        n, asked, identity = self.live.pop(trial_id)
        result = None if error or not result or "failure" in result else result
        if result is not None:
            self.measured[identity] = result
            if self.plan.speeds is not None and "id" in result:
                return  # its milliseconds come after the round, and until then it counts as under way
        self._tell(n, asked, result)
