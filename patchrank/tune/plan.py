"""The plan: which trials there are to be, and which of them are done."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from patchrank.config import Rule, TrialConfig, value_at
from patchrank.trial.inputs import Inputs, load_inputs
from patchrank.trial.prompts import lessons_key
from patchrank.trial.run import fingerprint, fit_tasks, is_fitted, trial_id
from patchrank.tune.records import Records
from patchrank.tune.space import Cell, allows, configure, fits, grid_points, random_points
from patchrank.tune.spaces import in_order
from patchrank.tune.speed import Speeds, beside, can_be_timed, own_hardware, wants_milliseconds
from patchrank.tune.sweep import Sweep
from patchrank.utils.errors import StoreError, UserError, near


@dataclass
class Plan:
    """All cells of a sweep, the axes that a search samples around them, and the records that there are already."""

    sweep: Sweep
    cells: list[Cell]
    sampled: dict[str, Rule]
    records: Records
    speeds: Speeds | None  # None where nobody wants milliseconds
    left_out: int = 0  # points of the grid that break a bound on GMACs
    fingerprints: dict[str, dict] = field(default_factory=dict)
    _inputs: dict[str, Inputs] = field(default_factory=dict)
    _trials: dict[str, TrialConfig] = field(default_factory=dict)
    _matches: dict[tuple[str, str], dict | None] = field(default_factory=dict)  # by cell and id

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_inputs": {}}  # Ray pickles its searcher, and towers need not travel with it

    @property
    def size(self) -> int:
        return sum(cell.samples for cell in self.cells)

    def unmet_axes(self) -> list[str]:
        """Axes of the grid that stand in no cell, since the others' values never meet their `when`."""
        grid = [key for key, rule in self.sweep.axes.items() if rule.kind == "grid"]
        return [key for key in grid if not any(key in cell.values for cell in self.cells)]

    def prunes(self) -> bool:
        """Whether any trial drops patches, or a search may draw one that does."""
        if not self.sampled.keys().isdisjoint(("pruning.keep_rate", "pruning.drop_counts")):
            return True
        pruning = [self.trial(cell.values).pruning for cell in self.cells]
        return any(each.keep_rate < 1 or each.drop_counts for each in pruning)

    def missing(self) -> int:
        """How many trials have neither finished nor been ended early."""
        return sum(max(0, cell.samples - len(list(self.records_of(cell)))) for cell in self.cells)

    def rows(self) -> list[dict]:
        """Finished records in plan order."""
        return [record for cell in self.cells for record, _ in self.records_of(cell) if record["status"] == "ok"]

    def stopped(self) -> list[dict]:
        """Records of trials that were ended early, in plan order."""
        return [record for cell in self.cells for record, _ in self.records_of(cell) if record["status"] == "stopped"]

    def failures(self) -> list[tuple[dict[str, object], dict]]:
        """Swept settings of trials that failed when they ran last, and what these left."""
        return [(values, record) for cell in self.cells for values, record in self._failures_of(cell)]

    def untimed(self) -> list[TrialConfig]:
        """One finished trial of each structure whose milliseconds are wanted and not measured yet."""
        if self.speeds is None:
            return []
        return self.speeds.lacking(TrialConfig.model_validate(row["config"]) for row in self.rows())

    def refresh(self) -> None:
        """Reads what trials and measurements have left since."""
        self.records.refresh()
        if self.speeds is not None:
            self.speeds.refresh()

    def forget(self) -> None:
        """Removes the records of this plan; shards and predictors stay."""
        for record in [*self.rows(), *self.stopped(), *(record for _, record in self.failures())]:
            self.records.forget(record["id"])

    def staged(self) -> list[TrialConfig]:
        """Trials that between them need all the shards of the sweep: the grid, and choices that matter to scoring."""
        choices = {key: rule.choice for key, rule in self.sampled.items() if rule.kind == "choice"}
        choices |= {key: _whole(rule) for key, rule in self.sampled.items() if rule.kind == "int_"}
        parts = ("model", "data", "golden", "predictor.fit_on", "pruning.locations", "pruning.reducer")
        scoring = {key: values for key, values in choices.items() if key.startswith(parts)}
        drawn = [dict(zip(scoring, values)) for values in itertools.product(*scoring.values())]
        return [self.trial(cell.values | values) for cell in self.cells for values in drawn]

    def trial(self, values: dict[str, object]) -> TrialConfig:
        """The sweep's trial with some settings replaced, checked once."""
        key = json.dumps(values, sort_keys=True)
        if key not in self._trials:
            self._trials[key] = configure(self.sweep.config.trial, values)
        return self._trials[key]

    def identify(self, trial: TrialConfig) -> str:
        """The id that this trial's record has, or would have."""
        key = json.dumps([_inputs_key(trial), fit_tasks(trial), lessons_key(trial)])
        if key not in self.fingerprints:
            self.fingerprints[key] = fingerprint(trial, self.inputs(trial))
        return trial_id(trial, self.fingerprints[key])

    def inputs(self, trial: TrialConfig) -> Inputs:
        """Model and data of a trial, shared by all trials that have the same."""
        key = _inputs_key(trial)
        if key not in self._inputs:
            self._inputs[key] = load_inputs(trial)
        return self._inputs[key]

    def record(self, identity: str) -> dict | None:
        """The record of a trial that need not run again: finished, or ended early under the rules in force."""
        asha = self.sweep.config.search.asha
        found = self.records.finished(identity) or self.records.stopped(identity, asha and asha.model_dump())
        if found is None or self.speeds is None:
            return found
        return beside(found, self.speeds.of(TrialConfig.model_validate(found["config"])))

    def records_of(self, cell: Cell) -> Iterator[tuple[dict, dict[str, object]]]:
        """Records of a cell that count, each with the values that its sampled axes took."""
        if not self.sampled:
            trial = self.trial(cell.values)
            if record := self.record(self.identify(trial)):
                yield record | {"config": trial.model_dump()}, {}  # the same trial may be written in several ways
            return
        for identity in self.records.ids():
            record = self.record(identity)
            drawn = None if record is None else self._match(record, cell)
            if drawn is not None:
                yield record, drawn

    def _failures_of(self, cell: Cell) -> Iterator[tuple[dict[str, object], dict]]:
        if not self.sampled:
            record = self.records.failed(self.identify(self.trial(cell.values)))
            found = [(cell.values, record)] if record else []
        else:
            errors = [record for name in self.records.ids() if (record := self.records.failed(name))]
            matches = [(self._match(record, cell), record) for record in errors]
            found = [(cell.values | drawn, record) for drawn, record in matches if drawn is not None]
        yield from (pair for pair in found if not self.record(pair[1]["id"]))

    def _match(self, record: dict, cell: Cell) -> dict[str, object] | None:
        """The values that sampled axes took in a record of this cell; None for one of another cell or sweep."""
        key = json.dumps(cell.values, sort_keys=True), record["id"]
        if key not in self._matches:
            drawn = self._drawn(record, cell)
            self._matches[key] = drawn if self._names(record, cell.values | drawn) else None
        return self._matches[key]

    def _drawn(self, record: dict, cell: Cell) -> dict[str, object]:
        """The values that sampled axes took in a record, those that may have been drawn around this cell."""
        drawn = {key: value_at(record["config"], key) for key in self.sampled}
        return {k: v for k, v in drawn.items() if allows(self.sampled[k], v, cell.values | drawn)}

    def _names(self, record: dict, values: dict[str, object]) -> bool:
        """Whether the sweep's trial with these values is the one that the record is of."""
        try:
            return self.identify(self.trial(values)) == record["id"]
        except StoreError:  # which says nothing about the record
            raise
        except UserError:
            return False


def _inputs_key(trial: TrialConfig) -> str:
    return json.dumps([trial.model.model_dump(), trial.data.model_dump()])


def _whole(rule: Rule) -> list[int]:
    """All values of a whole-number axis, both bounds among them."""
    low, high = rule.int_
    return list(range(low, high + 1, int(rule.step or 1)))


def make_plan(sweep: Sweep, fresh: bool = False, on_cluster: bool = False) -> Plan:
    """Expands grid axes, and those of a random search, into cells, and checks every one of them.

    Args:
        fresh: whether records that cannot be used are passed over.
        on_cluster: whether milliseconds are those of other machines than this one.

    Raises:
        UserError: a cell that cannot run, sampled axes under `method: grid`, bounds that nothing keeps, an objective
            that no trial returns, or a record that cannot be used.
    """
    search, base = sweep.config.search, sweep.config.trial
    grid = {key: rule for key, rule in sweep.axes.items() if rule.kind == "grid"}
    sampled = in_order({key: rule for key, rule in sweep.axes.items() if rule.kind != "grid"})
    _check_grid(grid, sampled)
    if sampled and search.method == "grid":
        raise UserError(f"search.method is 'grid', but {', '.join(sampled)} is sampled; near: random, optuna")
    points = grid_points(grid, base)
    for key, rule in sampled.items():
        _check_sampled(sweep, points[0], key, rule)
    is_random = search.method == "random" or search.sampler == "random"
    if sampled and is_random:
        bounds = sweep.config.constraints
        points = [drawn for point in points for drawn in random_points(point, sampled, base, search, bounds)]
    adaptive = {} if is_random else sampled
    kept = points if adaptive else [point for point in points if fits(configure(base, point), sweep.config.constraints)]
    if not kept:
        raise UserError(f"constraints: none of {len(points) or 'the'} points of the search space keeps them")
    cells = [Cell(point, search.samples if adaptive else 1) for point in kept]
    speeds = None
    if wants_milliseconds(sweep.config):
        speeds = Speeds(sweep.config, None if on_cluster else own_hardware(sweep.config.resources))
    plan = Plan(sweep, cells, adaptive, Records(sweep.config.root, fresh), speeds, len(points) - len(kept))
    _check_objectives(plan)
    return plan


def _check_objectives(plan: Plan) -> None:
    """Refuses objectives and bounds that no trial of the plan can return."""
    wanted = {each.metric for each in (*plan.sweep.config.objectives, *plan.sweep.config.constraints)}
    trials = plan.staged()
    if "matching_rate" in wanted and not any(map(is_fitted, trials)):
        raise UserError("objectives: no trial returns 'matching_rate', which takes a fitted ranking; near: val_cosine")
    if "ms" in wanted and not any(map(can_be_timed, trials)):
        raise UserError("objectives: no trial returns 'ms', since golden rankings cannot be deployed; near: gmacs")


def _check_grid(grid: dict[str, Rule], sampled: dict[str, Rule]) -> None:
    """Refuses axes of the grid that depend on what is only drawn around its points."""
    for key, rule in grid.items():
        for path in (path for each in rule.conditions for path in each if path in sampled):
            raise UserError(f"{key}: when names {path!r}, which is sampled, so {key} cannot be a grid; near: choice")


def _check_sampled(sweep: Sweep, point: dict[str, object], key: str, rule: Rule) -> None:
    """Tries every choice, or both bounds, of a sampled axis; and knows the axes that its `when` names."""
    if any(isinstance(value, dict) for value in rule.choice or ()):
        raise UserError(f"{key}: a mapping can stand in a grid, but not be sampled; near: {key}.<setting>")
    for value in rule.choice or rule.uniform or rule.int_:
        configure(sweep.config.trial, point | {key: value})
    named = {path for each in rule.conditions for path in each}
    unknown = sorted(named - set(sweep.axes))
    if unknown:
        raise UserError(f"{key}: when names {unknown[0]!r}, which is not swept; {near(unknown[0], sweep.axes)}")
