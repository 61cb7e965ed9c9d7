"""Which trials are on the Pareto front: no other beats them in one objective without losing in another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from patchrank.config import Constraint, Objective


@dataclass(frozen=True)
class Front:
    """Rows by what became of them.

    best: the front, by cost. equal: rows with exactly the objectives of one in it. beaten: all others that keep the
    constraints. infeasible: rows that break one. incomplete: rows that lack a figure.
    """

    objectives: Sequence[Objective]
    constraints: Sequence[Constraint]
    best: list[dict] = field(default_factory=list)
    equal: list[dict] = field(default_factory=list)
    beaten: list[dict] = field(default_factory=list)
    infeasible: list[dict] = field(default_factory=list)
    incomplete: list[dict] = field(default_factory=list)


def pareto_front(
    rows: Sequence[dict], objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()
) -> Front:
    """The front of some rows. Those that break a constraint are out of it first. The order of the rows changes nothing.

    Figures are compared exactly, never rounded. Of rows with equal objectives the one of the lowest id stands for all.
    """
    front, complete, kept = Front(objectives, constraints), [], []
    for row in rows:
        is_complete = all(is_number(row["metrics"].get(each.metric)) for each in (*objectives, *constraints))
        (complete if is_complete else front.incomplete).append(row)
    costs_first = sorted(objectives, key=lambda each: each.mode == "max")
    complete.sort(key=lambda row: (_losses(row, costs_first), row["id"]))
    for row in complete:
        is_kept = all(each.excess(row["metrics"]) <= 0 for each in constraints)
        (kept if is_kept else front.infeasible).append(row)
    losses = np.array([_losses(row, objectives) for row in kept])
    for n, (row, own) in enumerate(zip(kept, losses)):
        if ((losses <= own).all(1) & (losses < own).any(1)).any():
            front.beaten.append(row)
        elif (losses[:n] == own).all(1).any():
            front.equal.append(row)
        else:
            front.best.append(row)
    return front


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _losses(row: dict, objectives: Sequence[Objective]) -> list[float]:
    """The objectives' values, lower is better."""
    return [row["metrics"][each.metric] * (1 if each.mode == "min" else -1) for each in objectives]


def said(constraints: Sequence[Constraint]) -> str:
    """As "gmacs <= 12, val_cosine >= 0.99"."""
    texts = [
        f"{each.metric} >= {each.at_least:g}" if each.at_most is None else f"{each.metric} <= {each.at_most:g}"
        for each in constraints
    ]
    return ", ".join(texts)
