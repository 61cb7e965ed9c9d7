"""`--best`: chooses a trial by its figures on val and writes its model as files that timm loads."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import get_args

from patchrank.config import Constraint, Measured, Objective, TrialConfig
from patchrank.io import is_remote, join, read_json
from patchrank.report.pareto import is_number, said
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.save_model import CHOSEN, write_model
from patchrank.tune.console import say
from patchrank.tune.plan import Plan
from patchrank.utils.errors import UserError, near


def write_best(plan: Plan, rows: Sequence[dict], bounds: Sequence[Constraint], out: str | None) -> str:
    """Writes the best of the rows that keep all bounds; returns its folder, `<root>/best` where `out` is None.

    Raises:
        UserError: no row keeps the bounds, a trial that is not one model, or a folder that holds other things.
    """
    config = plan.sweep.config
    folder = out or ("best" if is_remote(config.root) else join(config.root, "best"))  # timm loads local folders alone
    row = choose(rows, config.objectives, bounds)
    trial = ResolvedTrial(TrialConfig.model_validate(row["config"]))
    known = read_json(join(folder, CHOSEN))
    if known is not None and known.get("id") == row["id"]:  # test is read once for a model
        figures = known["metrics"]
    else:
        figures = write_model(row, trial, plan.inputs(trial), config.shards, folder)
    shown = ("val_accuracy", "val_knn_accuracy", "val_cosine", "gmacs", "ms")
    shown += ("accuracy", "accuracy_unpruned", "knn_accuracy", "knn_accuracy_unpruned")
    told = ", ".join(f"{key} {figures[key]:.4g}" for key in shown if key in figures)
    load = f'timm.create_model("local-dir:{folder}", pretrained=True)'
    if "tower" not in (known := read_json(join(folder, CHOSEN))["load"]):
        load = known["pair"]
    say(f"best: {folder}  ({told})\n  {load}")
    return folder


BOUND = re.compile(r"(\w+)\s*(<=|>=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", re.IGNORECASE)


def parse_bounds(text: str) -> list[Constraint]:
    """Bounds as they are written behind `--best`: "gmacs<=12, val_cosine>=0.99".

    Raises:
        UserError: another syntax, or a metric that no choice may be made by.
    """
    bounds = []
    for part in map(str.strip, text.split(",")):
        found = BOUND.fullmatch(part)
        if found is None:
            rule = "must read metric<=number or metric>=number; try gmacs<=12,val_cosine>=0.99"
            raise UserError(f"bound {part!r}: {rule}")
        metric, sign, number = found.groups()
        if metric not in get_args(Measured):
            raise UserError(f"bound {part!r}: {metric!r} is nothing to choose by; {near(metric, get_args(Measured))}")
        bounds.append(Constraint(metric=metric, **{"at_most" if sign == "<=" else "at_least": float(number)}))
    return bounds


def choose(rows: Sequence[dict], objectives: Sequence[Objective], bounds: Sequence[Constraint]) -> dict:
    """The row that is best by the first objective among those that keep all bounds.

    Ties go by the further objectives, then by the lowest id. Oracles are never chosen: they rank by scores of the very
    images that they are measured on.

    Raises:
        UserError: no row keeps a bound, or all of them at once; it says how near any comes.
    """
    rows = [row for row in rows if row["config"]["pruning"]["reducer"] != "golden"]
    having = [row for row in rows if is_number(row["metrics"].get(objectives[0].metric))]
    if not having:
        there = [name for name in get_args(Measured) if any(is_number(row["metrics"].get(name)) for row in rows)]
        others = f"; try objectives of what there is: {', '.join(there)}" if there else ""
        raise UserError(f"no trial can be chosen: none has {objectives[0].metric}, oracles aside{others}")
    rows = having
    for bound in bounds:
        _keeping(rows, bound, ())
    left = rows
    for n, bound in enumerate(bounds):
        left = _keeping(left, bound, bounds[:n])

    def losses(row: dict) -> tuple[list[float], str]:  # lower is better; what is not there comes last
        signs = {each.metric: 1 if each.mode == "min" else -1 for each in objectives}
        values = {metric: row["metrics"].get(metric) for metric in signs}
        return [signs[key] * value if is_number(value) else math.inf for key, value in values.items()], row["id"]

    return min(left, key=losses)


def _keeping(rows: Sequence[dict], bound: Constraint, earlier: Sequence[Constraint]) -> list[dict]:
    """The rows that keep a bound, at least one."""
    having = [row for row in rows if is_number(row["metrics"].get(bound.metric))]
    kept = [row for row in having if bound.excess(row["metrics"]) <= 0]
    if kept:
        return kept
    whose = f"no trial that keeps {said(earlier)}" if earlier else "no trial"
    if not having:
        raise UserError(f"{whose} has {bound.metric}, so none keeps {said([bound])}")
    values = [row["metrics"][bound.metric] for row in having]
    end = f"the lowest is {min(values):.6g}" if bound.at_least is None else f"the highest is {max(values):.6g}"
    raise UserError(f"{whose} has {said([bound])}; {end}")
