"""An axis with several rules, of which the grid chooses one; what a search draws, finds again and exports by them."""

from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from patchrank.tune.exports import Study, export_optuna
from patchrank.tune.plan import make_plan
from patchrank.tune.search import CellSearch
from patchrank.tune.sweep import load_sweep
from patchrank.utils.errors import UserError

ROOT = Path(__file__).parents[2]
SPACE = """
pruning.reducer: {grid: [tome, random]}
pruning.budget: {grid: [0.75]}
pruning.locations:
  - {choice: [[2, 3, 4], [3, 4, 5]], when: {pruning.reducer: [tome]}}
  - {choice: [[4], [6], [4, 7]]}
"""


def load(tmp_path, space, method="optuna"):
    sweep = (ROOT / "sweeps/locations.yaml").read_text().replace("../search_spaces/locations.yaml", "space.yaml")
    sweep = sweep.replace("{method: grid}", f"{{method: {method}, samples: 3}}").partition("report:")[0]
    sweep = sweep.replace("leftovers: drop", "leftovers: null").replace("root: runs", f"root: {tmp_path}/runs")
    (tmp_path / "sweep.yaml").write_text(f"{sweep}report: {{table: x}}\n")
    (tmp_path / "space.yaml").write_text(space)
    return load_sweep(str(tmp_path / "sweep.yaml"))


@pytest.mark.parametrize("method", ["optuna", "random"])
def test_the_grid_says_which_rule_draws(tmp_path, method):
    plan = make_plan(load(tmp_path, SPACE, method))
    points = [cell.values for cell in plan.cells]
    if method == "optuna":
        points, search = [], CellSearch(plan)
        while isinstance(asked := search.suggest(f"{len(points)}"), dict):
            points.append(asked["values"])
    drawn = {(point["pruning.reducer"], tuple(point["pruning.locations"])) for point in points}
    expected = {("tome", (2, 3, 4)), ("tome", (3, 4, 5)), ("random", (4,)), ("random", (6,)), ("random", (4, 7))}
    assert drawn == expected


def test_where_no_rule_is_met_the_trials_own_value_stands(tmp_path):
    space = SPACE.replace("{choice: [[4], [6], [4, 7]]}", "{choice: [[5]], when: {pruning.reducer: [center]}}")
    plan = make_plan(load(tmp_path, space))
    assert plan.staged()[-1].config.pruning.locations == (4, 6, 8, 10)


def test_every_study_is_exported_with_its_own_choices(tmp_path):
    plan = make_plan(load(tmp_path, SPACE))
    record = {"id": "a", "status": "ok", "metrics": {"val_accuracy": 90.0}, "date": "2026-11-28"}
    drawn = ([2, 3, 4], [4, 7])
    studies = [
        Study(cell.values["pruning.reducer"], [({"pruning.locations": place}, record)], cell.sampled)
        for cell, place in zip(plan.cells, drawn)
    ]
    path = export_optuna(studies, plan.sampled, plan.sweep.config)
    storage = JournalStorage(JournalFileBackend(path))
    for name, place in zip(("tome", "random"), drawn):
        (trial,) = optuna.load_study(study_name=name, storage=storage).trials
        assert trial.params == {"pruning.locations": f"{place}"}
        assert len(trial.distributions["pruning.locations"].choices) == (2 if name == "tome" else 3)


@pytest.mark.parametrize(
    "rules, message",
    [
        ("[{choice: [[4]]}, {grid: [[5]]}]", "of several rules none can be a grid"),
        ("[{choice: [[4]]}, {uniform: [1, 2]}]", "must be of one kind, but are choice, uniform"),
        ("[{choice: [[4]], when: {pruning.taper: [1.0]}}, {choice: [[5]]}]", "'pruning.taper', which when names, is s"),
        ("[]", "must hold a mapping of keys to values"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(tmp_path, rules, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, f"pruning.taper: {{choice: [0.5, 1.0]}}\npruning.locations: {rules}")
