"""Which trials are on the Pareto front: no other beats them in one objective without losing in another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from patchrank.config import Constraint, Objective


@dataclass(frozen=True)
class Front:
    """Rows by what became of them.

    best: the front, by cost; equal: such as have exactly the objectives of one in it; beaten: all others that keep the
    constraints; infeasible: those that break one; incomplete: those that lack a figure.
    """

    best: list[dict]
    equal: list[dict] = field(default_factory=list)
    beaten: list[dict] = field(default_factory=list)
    infeasible: list[dict] = field(default_factory=list)
    incomplete: list[dict] = field(default_factory=list)


def pareto_front(rows: Sequence[dict], objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> Front:
    """The front of some rows. Those that break a constraint are out of it first; no order of rows changes it.

    Exact: figures are compared as they are, never rounded. Of rows with equal objectives the one of the lowest id
    stands for all.
    """
    read = {each.metric for each in (*objectives, *constraints)}
    complete, incomplete = _divided(rows, lambda metrics: all(is_number(metrics.get(metric)) for metric in read))
    complete.sort(key=lambda row: _order(row, objectives))
    kept, infeasible = _divided(complete, lambda metrics: all(each.excess(metrics) <= 0 for each in constraints))
    losses = np.array([_losses(row, objectives) for row in kept]).reshape(len(kept), len(objectives))
    front = Front([], infeasible=infeasible, incomplete=incomplete)
    for n, (row, own) in enumerate(zip(kept, losses)):
        if ((losses <= own).all(1) & (losses < own).any(1)).any():
            front.beaten.append(row)
        else:
            (front.equal if (losses[:n] == own).all(1).any() else front.best).append(row)
    return front


def _divided(rows: Sequence[dict], holds: Callable[[dict], bool]) -> tuple[list[dict], list[dict]]:
    """Rows whose metrics pass, and the others."""
    passed = [holds(row["metrics"]) for row in rows]
    return [row for row, ok in zip(rows, passed) if ok], [row for row, ok in zip(rows, passed) if not ok]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _losses(row: dict, objectives: Sequence[Objective]) -> list[float]:
    """The objectives' values, lower is better."""
    return [row["metrics"][each.metric] * (1 if each.mode == "min" else -1) for each in objectives]


def _order(row: dict, objectives: Sequence[Objective]) -> tuple:
    """By cost, what costs the same by worth, and by id in the end."""
    costs_first = sorted(objectives, key=lambda each: each.mode == "max")
    return *_losses(row, costs_first), row["id"]


def said(constraints: Sequence[Constraint]) -> str:
    """As "gmacs <= 12, val_cosine >= 0.99"."""
    texts = [
        f"{each.metric} >= {each.at_least:g}" if each.at_most is None else f"{each.metric} <= {each.at_most:g}"
        for each in constraints
    ]
    return ", ".join(texts)
