"""What TensorBoard and optuna-dashboard are given of a sweep, once it has been run."""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.tune.console import describe
from patchrank.tune.exports import Study, export_optuna, export_tensorboard
from patchrank.tune.plan import Plan


def export(plan: Plan, rows: Sequence[dict]) -> None:
    """Writes both below the sweep's root. Raises `UserError` where nothing can be written there."""
    config = plan.sweep.config
    export_tensorboard(rows, config.root, list(plan.sweep.axes))
    rules = plan.sampled or plan.sweep.axes
    export_optuna(_studies(plan), rules, config.objectives, config.constraints, config.root)


def _studies(plan: Plan) -> list[Study]:
    """One study for each cell that is searched around; one in all where every trial is a point of a plan."""
    failed = plan.failures()
    if not plan.sampled:
        done = [(cell.values, record) for cell in plan.cells for record, _ in plan.records_of(cell)]
        return [Study(plan.sweep.config.name, done + failed)]
    studies = []
    for cell in plan.cells:
        trials = [(drawn, record) for record, drawn in plan.records_of(cell)]
        here = [(values, record) for values, record in failed if cell.values.items() <= values.items()]
        trials += [(_around(values, plan), record) for values, record in here]
        studies.append(Study(describe(cell.values), trials))
    return studies


def _around(values: dict[str, object], plan: Plan) -> dict[str, object]:
    return {key: value for key, value in values.items() if key in plan.sampled}
