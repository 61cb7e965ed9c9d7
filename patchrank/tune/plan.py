"""The plan: which trials there are to be, and which of them are done."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from patchrank.config import DataConfig, ModelConfig, Rule, value_at
from patchrank.golden.shards import ShardFolder
from patchrank.trial.identity import trial_id
from patchrank.trial.inputs import Inputs, load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import figures_of
from patchrank.tune.records import Records
from patchrank.tune.space import Cell, allows, configure, fits, grid_points, in_order, random_points, rules_around
from patchrank.tune.speed import Speeds
from patchrank.tune.sweep import Sweep
from patchrank.utils.errors import StoreError, UserError


@dataclass
class Job:
    """One set of shards: a trial that needs it, and what is wrong with the shards that are to be made.

    passed_over: as in `ImageSplit`, of the images that are scored.
    batch: sequences that ran at a time, where shards were made just now.
    """

    trial: ResolvedTrial
    folder: ShardFolder
    faults: dict[int, str]
    passed_over: dict[str, int] = field(default_factory=dict)
    batch: int | None = None

    @property
    def name(self) -> str:
        return f"{self.folder.header['data']['task']}/{self.folder.header['data']['split']}"


@dataclass
class Plan:
    """All cells of a sweep, the axes that a search samples around them, and the records that there are already."""

    sweep: Sweep
    cells: list[Cell]
    sampled: dict[str, Rule]
    records: Records
    speeds: Speeds | None  # None where nobody wants milliseconds
    left_out: int = 0  # points of the grid that break a bound on GMACs
    _inputs: dict[tuple[ModelConfig, DataConfig], Inputs] = field(default_factory=dict)
    _trials: dict[str, ResolvedTrial] = field(default_factory=dict)
    _contexts: dict[ResolvedTrial, TrialContext] = field(default_factory=dict)
    _matches: dict[tuple[str, str], dict | None] = field(default_factory=dict)  # by cell and id

    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "_inputs": {},
            "_contexts": {},
        }  # Ray pickles its searcher, and towers need not travel with it

    # ---- its trials

    @property
    def size(self) -> int:
        return sum(cell.samples for cell in self.cells)

    def unmet_axes(self) -> list[str]:
        """Axes of the grid that stand in no cell, since the others' values never meet their `when`."""
        met = {key for cell in self.cells for key in cell.values}
        return [key for key, rule in self.sweep.axes.items() if rule.kind == "grid" and key not in met]

    def trial(self, values: dict[str, object]) -> ResolvedTrial:
        """The sweep's trial with some settings replaced, checked and resolved once."""
        key = json.dumps(values, sort_keys=True)
        if key not in self._trials:
            self._trials[key] = configure(self.sweep.config.trial, values)
        return self._trials[key]

    def prunes(self) -> bool:
        """Whether any trial drops patches, or a search may draw one that does."""
        may = not self.sampled.keys().isdisjoint(("pruning.keep_rate", "pruning.drop_counts", "pruning.budget"))
        return may or any(self.trial(cell.values).prunes for cell in self.cells)

    def staged(self) -> list[ResolvedTrial]:
        """Trials that between them need all the shards of the sweep: the grid, and choices that matter to scoring."""
        parts = ("model", "data", "golden", "predictor.fit_on", "pruning.locations", "pruning.reducer")
        found: dict[ResolvedTrial, None] = {}
        for cell in self.cells:
            scoring = {}
            for key, rule in cell.sampled.items():
                if key.startswith(parts) and rule.kind != "uniform":
                    scoring[key] = rule.choice or range(rule.int_[0], rule.int_[1] + 1, int(rule.step or 1))
            for values in itertools.product(*scoring.values()):
                found[self.trial(_that_stand(cell, cell.values | dict(zip(scoring, values))))] = None
        return list(found)

    def jobs(self) -> list[Job]:
        """All sets of shards that the sweep needs, each once."""
        jobs: dict[str, Job] = {}
        for trial in self.staged():
            for split, folder in self.context(trial).needed_shards.values():
                if folder.key not in jobs:
                    jobs[folder.key] = Job(trial, folder, folder.faults(), split.passed_over)
        return list(jobs.values())

    def inputs(self, trial: ResolvedTrial) -> Inputs:
        """Model and data of a trial, shared by all trials that have the same."""
        key = trial.config.model, trial.config.data
        if key not in self._inputs:
            self._inputs[key] = load_inputs(*key)
        return self._inputs[key]

    def context(self, trial: ResolvedTrial) -> TrialContext:
        """A trial with its model and data at hand, made once."""
        if trial not in self._contexts:
            self._contexts[trial] = TrialContext(trial, self.inputs(trial), self.sweep.config.shards)
        return self._contexts[trial]

    def identify(self, trial: ResolvedTrial) -> str:
        """The id that this trial's record has, or would have."""
        return trial_id(self.context(trial))

    # ---- its records

    def refresh(self) -> None:
        """Reads what trials and measurements have left since."""
        self.records.refresh()
        if self.speeds is not None:
            self.speeds.refresh()

    def forget(self) -> None:
        """Removes the records of this plan; shards and predictors stay."""
        for cell in self.cells:
            for identity, _ in self._known(cell):
                self.records.forget(identity)

    def missing(self) -> int:
        """How many trials have neither finished nor been ended early."""
        return sum(max(0, cell.samples - len(list(self.records_of(cell)))) for cell in self.cells)

    def rows(self, status: Literal["ok", "stopped"] = "ok") -> list[dict]:
        """Records of trials that finished, or were ended early, in plan order; with milliseconds where wanted."""
        return [record for cell in self.cells for record, _ in self.records_of(cell) if record["status"] == status]

    def failures(self) -> list[tuple[dict[str, object], dict]]:
        """Swept settings of trials that failed when they ran last, and what these left."""
        known = [(cell.values | drawn, identity) for cell in self.cells for identity, drawn in self._known(cell)]
        failed = [(values, self.records.failed(identity)) for values, identity in known if not self.record(identity)]
        return [(values, record) for values, record in failed if record is not None]

    def untimed(self) -> list[ResolvedTrial]:
        """One finished trial of each structure whose milliseconds are wanted and not measured yet."""
        if self.speeds is None:
            return []
        return self.speeds.lacking(
            self.trial(cell.values | drawn)
            for cell in self.cells
            for record, drawn in self.records_of(cell)
            if record["status"] == "ok"
        )

    def record(self, identity: str) -> dict | None:
        """The record of a trial that need not run again: finished, or ended early under the rules in force."""
        asha = self.sweep.config.search.asha
        return self.records.ended(identity, asha and asha.model_dump())

    def records_of(self, cell: Cell) -> Iterator[tuple[dict, dict[str, object]]]:
        """Records of a cell that count, each with the values that its sampled axes took."""
        for identity, drawn in self._known(cell):
            record = self.record(identity)
            if record is None:
                continue
            trial = self.trial(cell.values | drawn)
            record = record | {"config": trial.config.model_dump()}  # in full, and as this sweep writes the trial
            yield record if self.speeds is None else self.speeds.beside(record, trial), drawn

    def _known(self, cell: Cell) -> Iterator[tuple[str, dict[str, object]]]:
        """Ids of a cell's trials, each with the values that its sampled axes took: those that records tell of."""
        if not self.sampled:
            yield self.identify(self.trial(cell.values)), {}
            return
        for identity, config in self.records.configs().items():
            key = json.dumps(cell.values, sort_keys=True), identity
            if key not in self._matches:
                self._matches[key] = self._drawn(identity, config, cell)
            if self._matches[key] is not None:
                yield identity, self._matches[key]

    def _drawn(self, identity: str, config: dict, cell: Cell) -> dict[str, object] | None:
        """The values that sampled axes took in a trial of this cell; None for one of another cell or sweep."""
        try:
            values = cell.values | {path: value_at(config, path) for path in cell.sampled}
            drawn = {path: values[path] for path, rule in cell.sampled.items() if allows(rule, values[path], values)}
            return drawn if self.identify(self.trial(cell.values | drawn)) == identity else None
        except StoreError:  # which says nothing about the trial
            raise
        except UserError:  # it is another sweep's, or another version's
            return None


def _that_stand(cell: Cell, values: dict[str, object]) -> dict[str, object]:
    """Values without those of sampled axes whose `when` the others do not meet, as far as they tell."""
    rules = {key: cell.sampled[key] for key in values if key in cell.sampled}
    known = [key for key, rule in rules.items() if rule.depends_on <= values.keys()]
    return {key: value for key, value in values.items() if key not in known or rules[key].holds(values.get)}


def make_plan(sweep: Sweep, fresh: bool = False, on_cluster: bool = False) -> Plan:
    """Expands grid axes, and those of a random search, into cells, and checks every one of them.

    Args:
        fresh: whether records that cannot be used are passed over.
        on_cluster: whether milliseconds are those of other machines than this one.

    Raises:
        UserError: a cell that cannot run, sampled axes under `method: grid`, bounds that nothing keeps, an objective
            that no trial returns, or a record that cannot be used.
    """
    config = sweep.config
    sampled = in_order({key: rule for key, rule in sweep.axes.items() if rule.kind != "grid"})
    is_random = "random" in (config.search.method, config.search.sampler)
    adaptive = {} if is_random else sampled
    points = kept = _points(sweep, sampled, is_random)
    if not adaptive:
        kept = [point for point in points if fits(configure(config.trial, point), config.constraints)]
    if not kept:
        raise UserError(f"constraints: none of {len(points) or 'the'} points of the search space keeps them")
    samples = config.search.samples if adaptive else 1
    cells = [Cell(point, samples, rules_around(point, adaptive, config.trial)) for point in kept]
    wants_milliseconds = any(each.metric == "ms" for each in (*config.objectives, *config.constraints))
    speeds = Speeds(config, on_cluster) if wants_milliseconds else None
    plan = Plan(sweep, cells, adaptive, Records(config.root, fresh), speeds, len(points) - len(kept))
    _check_objectives(plan)
    return plan


def _points(sweep: Sweep, sampled: dict[str, Rule], is_random: bool) -> list[dict[str, object]]:
    """Points of the grid, or those that a random search draws around them; every value of a sampled axis is tried."""
    search, base = sweep.config.search, sweep.config.trial
    if sampled and search.method == "grid":
        raise UserError(f"search.method is 'grid', but {', '.join(sampled)} is sampled; try random or optuna")
    points = grid_points({key: rule for key, rule in sweep.axes.items() if rule.kind == "grid"}, base)
    around = [rules_around(point, sampled, base) for point in points]
    for key in sampled:
        tried = {}  # each rule of the axis once, around the first point where it counts
        for point, rules in zip(points, around):
            tried.setdefault(rules[key], point)
        for rule, point in tried.items():
            for value in rule.choice or rule.uniform or rule.int_:
                configure(base, point | {key: value})
    if not sampled or not is_random:
        return points
    return [drawn for point, rules in zip(points, around) for drawn in random_points(point, rules, sweep.config)]


def check_figures(plan: Plan) -> None:
    """Refuses a search by figures that none of its models has on its images; a plan that is all known needs none."""
    if not plan.sampled:
        return
    found = set().union(*(figures_of(plan.context(trial)) for trial in plan.staged()))
    for each in (*plan.sweep.config.objectives, *plan.sweep.config.constraints):
        if each.metric.startswith("val_") and each.metric not in found:
            name = plan.sweep.config.trial.model.name
            raise UserError(f"objectives: no trial of {name} returns {each.metric!r}; try {', '.join(sorted(found))}")


def _check_objectives(plan: Plan) -> None:
    """Refuses objectives and bounds that no trial of the plan can return."""
    wanted = {each.metric for each in (*plan.sweep.config.objectives, *plan.sweep.config.constraints)}
    trials = plan.staged()
    if "matching_rate" in wanted and not any(trial.is_fitted for trial in trials):
        raise UserError("objectives: no trial returns 'matching_rate', which takes a fitted ranking; try val_cosine")
    if "ms" in wanted and not any(trial.can_be_timed for trial in trials):
        raise UserError("objectives: no trial returns 'ms', since golden rankings cannot be deployed; try gmacs")
