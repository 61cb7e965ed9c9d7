"""The plan: which trials there are to be, and which of them are done."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from patchrank.checks import check_trial
from patchrank.config import PromptConfig, Rule, TrialConfig, known_keys, validate, value_at
from patchrank.errors import UserError, near
from patchrank.files import exists, join, list_names, read_json, remove
from patchrank.inputs import Inputs, load_inputs
from patchrank.trial import fingerprint, fit_tasks, trial_id
from patchrank.tune.spec import Sweep
from patchrank.tuned import lessons_key


@dataclass
class Cell:
    """One point of the grid: a trial, or a search over the sampled axes around it."""

    values: dict[str, object]
    samples: int


@dataclass
class Plan:
    """All cells of a sweep, its sampled axes, and the records that there are already."""

    sweep: Sweep
    cells: list[Cell]
    sampled: dict[str, Rule]
    records: dict[str, dict] = field(default_factory=dict)
    fingerprints: dict[str, dict] = field(default_factory=dict)
    _inputs: dict[str, Inputs] = field(default_factory=dict)
    _trials: dict[str, TrialConfig] = field(default_factory=dict)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_inputs": {}}  # Ray pickles its searcher, and towers need not travel with it

    @property
    def size(self) -> int:
        return sum(cell.samples for cell in self.cells)

    def missing(self) -> int:
        """How many trials have no record."""
        return sum(max(0, cell.samples - len(list(self.records_of(cell)))) for cell in self.cells)

    def rows(self) -> list[dict]:
        """Finished records in plan order."""
        return [record for cell in self.cells for record, _ in self.records_of(cell)]

    def forget(self) -> None:
        """Removes the records of this plan; shards and predictors stay."""
        for row in self.rows():
            remove(join(self.sweep.config.root, "trials", f"{row['id']}.json"))
        self.records.clear()

    def staged(self) -> list[TrialConfig]:
        """Trials that between them need all the shards of the sweep: the grid, and choices that matter to scoring."""
        choices = {key: rule.choice for key, rule in self.sampled.items() if rule.kind == "choice"}
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
        """The finished record of a trial, if there is one."""
        if identity not in self.records:
            path = join(self.sweep.config.root, "trials", identity)
            found = read_json(f"{path}.json")
            if found is None or found.get("status") != "ok" or found.get("id") != identity or not exists(f"{path}.npz"):
                return None
            self.records[identity] = found
        return self.records[identity]

    def records_of(self, cell: Cell) -> Iterator[tuple[dict, dict[str, object]]]:
        """Finished records of a cell, each with the values that its sampled axes took."""
        if not self.sampled:
            trial = self.trial(cell.values)
            if record := self.record(self.identify(trial)):
                yield record | {"config": trial.model_dump()}, {}  # the same trial may be written in several ways
            return
        for record in self._all_records():
            drawn = {key: value_at(record["config"], key) for key in self.sampled}
            drawn = {k: v for k, v in drawn.items() if allows(self.sampled[k], v, cell.values | drawn)}
            if self._names(record, cell.values | drawn):
                yield record, drawn

    def _names(self, record: dict, values: dict[str, object]) -> bool:
        """Whether the sweep's trial with these values is the one that the record is of."""
        try:
            return self.identify(self.trial(values)) == record["id"]
        except UserError:
            return False

    def _all_records(self) -> list[dict]:
        folder = join(self.sweep.config.root, "trials")
        names = [name.removesuffix(".json") for name in list_names(folder) if name.endswith(".json")]
        return [record for name in names if "." not in name and (record := self.record(name))]


def _inputs_key(trial: TrialConfig) -> str:
    return json.dumps([trial.model.model_dump(), trial.data.model_dump()])


def allows(rule: Rule, value: object, others: dict[str, object]) -> bool:
    """Whether a rule may have drawn a value, beside the values of other axes."""
    if not rule.holds(others.get):
        return False
    if rule.kind == "choice":
        return value in rule.choice
    low, high = rule.uniform if rule.kind == "uniform" else rule.int_
    return isinstance(value, int | float) and low <= value <= high


def configure(base: TrialConfig, values: dict[str, object]) -> TrialConfig:
    """`base` with settings replaced by path; a mapping changes the keys that it names of a whole section.

    Raises:
        UserError: a value that does not fit its setting.
    """
    raw = _replaced(base, values)
    where = ", ".join(f"{path}={value}" for path, value in values.items()) or "trial"
    trial = validate(TrialConfig, raw, where)
    try:
        check_trial(trial)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return trial


def _replaced(base: TrialConfig, values: dict[str, object]) -> dict:
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


def make_plan(sweep: Sweep) -> Plan:
    """Expands grid axes into cells and checks every one of them.

    Raises:
        UserError: a cell that cannot run, or sampled axes under `method: grid`.
    """
    search = sweep.config.search
    grid = {key: rule for key, rule in sweep.axes.items() if rule.kind == "grid"}
    sampled = {key: rule for key, rule in sweep.axes.items() if rule.kind != "grid"}
    if sampled and search.method == "grid":
        raise UserError(f"search.method is 'grid', but {', '.join(sampled)} is sampled; near: random, optuna")
    samples = search.samples if sampled else 1
    cells = [Cell(values, samples) for values in _points(grid, sweep.config.trial)]
    plan = Plan(sweep, cells, sampled)
    for cell in cells:
        plan.trial(cell.values)
    for key, rule in sampled.items():
        _check_sampled(plan, key, rule)
    return plan


def _points(grid: dict[str, Rule], base: TrialConfig) -> list[dict[str, object]]:
    """Points of the grid, each once; an axis stands only in those that meet its `when`."""
    points: dict[str, dict[str, object]] = {}
    for values in itertools.product(*(rule.grid for rule in grid.values())):
        point = _standing(dict(zip(grid, values)), grid, base)
        points.setdefault(json.dumps(_replaced(base, point), sort_keys=True), point)
    return list(points.values())


def _standing(point: dict[str, object], grid: dict[str, Rule], base: TrialConfig) -> dict[str, object]:
    """The axes of a point whose `when` is met; an axis that falls may take others with it."""
    raw = _replaced(base, point)
    left = {key: value for key, value in point.items() if _meets(key, grid[key], raw)}
    return left if left == point else _standing(left, grid, base)


def _meets(key: str, rule: Rule, raw: dict) -> bool:
    for path in (path for each in rule.conditions for path in each):
        *parents, last = path.split(".")
        if last not in known_keys(TrialConfig, tuple(parents)):
            raise UserError(f"{key}: when names {last!r}, which is no setting of a trial")
    return rule.holds(lambda path: value_at(raw, path))


def _check_sampled(plan: Plan, key: str, rule: Rule) -> None:
    """Tries every choice, or both bounds, of a sampled axis; and knows the axes that its `when` names."""
    if any(isinstance(value, dict) for value in rule.choice or ()):
        raise UserError(f"{key}: a mapping can stand in a grid, but not be sampled; near: {key}.<setting>")
    for value in rule.choice or rule.uniform or rule.int_:
        plan.trial(plan.cells[0].values | {key: value})
    named = {path for each in rule.conditions for path in each}
    unknown = sorted(named - set(plan.sampled) - set(plan.cells[0].values))
    if unknown:
        raise UserError(f"{key}: when names {unknown[0]!r}, which is not swept; {near(unknown[0], plan.sweep.axes)}")
