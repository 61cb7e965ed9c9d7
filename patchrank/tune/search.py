"""What to try next. Nothing here is the truth: records are, so that a killed driver loses nothing.

Around sampled axes Optuna searches, with one study per cell of the grid, in memory and rebuilt from records at every
start. Cells of a plan whose trials are all known beforehand have one trial each, and nothing is drawn for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from patchrank.io import content_id
from patchrank.report.pareto import is_number
from patchrank.tune.console import Failure, describe, say
from patchrank.tune.early_stopping import STEP, VALUE, was_stopped
from patchrank.tune.plan import Plan
from patchrank.tune.space import MOST, TRIES, create_study, directions, encode, excesses, fits, past_trial, sample

STUBBORN = 8  # repeated proposals in a row after which a trial is drawn at random
EMPTY: Mapping = MappingProxyType({})


class ReplayedNSGAII(optuna.samplers.NSGAIISampler):
    """NSGA-II on a study that begins with trials from records.

    Modifications: generations are kept here by number of trial. Optuna's own sampler keeps them inside of trials, where
    those from records have none, so that nothing would ever be bred from them.

    Args:
        num_known: how many trials a study is told from records before it is asked for its first one.
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


class CellSearch(Searcher):
    """Asks one Optuna study per cell for trials that have no record yet, the cell with the fewest trials first.

    So the cells of a plan without sampled axes, of one trial each, come in order. All state is in records, and Ray's
    snapshots hold nothing.

    Args:
        failed: by id, trials that failed in this run of the driver, and are not tried again in it.
        lost: by id, values of trials whose worker was lost in this run, and that come first.
    """

    def __init__(
        self, plan: Plan, failed: Mapping[str, Failure] = EMPTY, lost: Mapping[str, dict[str, object]] = EMPTY
    ):
        config = plan.sweep.config
        super().__init__(metric=config.objectives[0].metric, mode=config.objectives[0].mode)
        self.plan, self.objectives, self.constraints = plan, config.objectives, config.constraints
        self.live: dict[str, tuple[int, optuna.Trial, str]] = {}  # by Ray's trial id: cell, Optuna's trial, ours
        self.measured: dict[str, dict] = {}  # metrics by id
        known = [list(plan.records_of(cell)) for cell in plan.cells]
        self.chance = optuna.samplers.RandomSampler(seed=config.search.seed + sum(map(len, known)))
        self.studies = [self._rebuilt(n, records) for n, records in enumerate(known)]
        self.ids = [[record["id"] for record, _ in records] for records in known]  # of every cell, those under way too
        before = [values for values, record in plan.failures() if record["id"] not in failed]
        for cell, study, ids in zip(plan.cells, self.studies, self.ids):
            ids += [identity for identity, failure in failed.items() if cell.holds(failure.values)]
            for values in filter(cell.holds, [*lost.values(), *before]):  # with which the study is to begin
                drawn = {key: encode(rule, values[key]) for key, rule in cell.sampled.items() if key in values}
                study.enqueue_trial(drawn)

    def _rebuilt(self, n: int, known: list[tuple[dict, dict[str, object]]]) -> optuna.Study:
        """A study that knows the records of its cell; its draws do not begin again where earlier runs began."""
        search = self.plan.sweep.config.search
        seed = int(content_id([search.seed, n, len(known)])[:8], 16)
        sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=seed)
        if search.sampler == "nsga2":  # whose first generation, which is random, is a quarter of the samples
            sampler = ReplayedNSGAII(seed, max(4, min(50, search.samples // 4)), len(known))
        study = create_study(sampler=sampler, directions=directions(self.objectives))
        for record, drawn in known:
            past = past_trial(record, drawn, self.plan.cells[n].sampled, self.plan.sweep.config)
            if past.state == TrialState.PRUNED and len(self.objectives) > 1:
                past.state = TrialState.FAIL  # Optuna compares what was ended early by one objective alone
            study.add_trial(past)
            self.measured[record["id"]] = record["metrics"]
        return study

    def suggest(self, trial_id: str) -> dict | str:
        for n in sorted(range(len(self.ids)), key=lambda n: len(self.ids[n])):
            if len(self.ids[n]) >= self.plan.cells[n].samples:
                continue
            found = self._ask(n)
            if found is None:
                cell, there = self.plan.cells[n], len(self.ids[n])
                note = f"the space gives {there} of {cell.samples} trials that keep its bounds"
                say(f"  note: {describe(cell.values)}: {note}")
                cell.samples = there
                continue
            asked, identity, values = found
            self.ids[n].append(identity)
            self.live[trial_id] = n, asked, identity
            return {"values": values}
        return Searcher.FINISHED

    def _ask(self, n: int) -> tuple[optuna.Trial, str, dict[str, object]] | None:
        """A new configuration of cell n that may keep the bounds, or None: Optuna's trial, our id, and values.

        Samplers repeat themselves, above all while what they have proposed is not measured yet. After `STUBBORN`
        repetitions the next one is drawn at random.
        """
        repeated, study, sampler = 0, self.studies[n], self.studies[n].sampler
        for _ in range(MOST):
            study.sampler = sampler if repeated < STUBBORN else self.chance
            asked = study.ask()
            values = sample(asked, self.plan.cells[n].sampled, self.plan.cells[n].values)
            study.sampler = sampler
            trial = self.plan.trial(values)
            identity = self.plan.identify(trial)
            is_known = identity in self.ids[n]
            if not is_known and fits(trial, self.constraints):
                return asked, identity, values
            self._tell(n, asked, self.measured.get(identity))
            repeated += is_known
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

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass
