"""Records as trials of an Optuna study: of a search that goes on from them, and of one that is only looked at."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial, TrialState, create_trial

from patchrank.config import Constraint, Objective, Rule
from patchrank.report.pareto import is_number, said
from patchrank.tune.early_stopping import STEP, VALUE
from patchrank.tune.space import distribution, encode


def past_trial(
    record: dict,
    drawn: Mapping[str, object],
    rules: Mapping[str, Rule],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
) -> FrozenTrial:
    """A record as an Optuna trial: with the objectives' values, or with the reason why there are none.

    Args:
        record: of status `ok`, `stopped` or `error`.
        drawn: the values that its sampled axes took, by dotted path.
        rules: of those axes, none of them a grid.
    """
    metrics, reached, cause = record.get("metrics", {}), record.get("reached"), _cause(record, objectives, constraints)
    about = {"id": record["id"]} | {key: value for key, value in metrics.items() if is_number(value)}
    if cause is None:
        state, values = TrialState.COMPLETE, [metrics[each.metric] for each in objectives]
    else:
        state, values = TrialState.PRUNED if record["status"] == "stopped" else TrialState.FAIL, None
        about["cause"] = cause
    trial = create_trial(
        state=state,
        values=values,
        params={key: encode(rules[key], value) for key, value in drawn.items()},
        distributions={key: distribution(rules[key]) for key in drawn},
        user_attrs=about,
        intermediate_values={reached[STEP]: reached[VALUE]} if reached else None,
        constraints=excesses(metrics, constraints) if cause is None else None,
    )
    day = datetime.datetime.fromisoformat(record.get("date", "1970-01-02"))  # all that a record says of time
    trial.datetime_start = trial.datetime_complete = day
    return trial


def _cause(record: dict, objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> str | None:
    """Why a trial has no values; None where it has all figures that objectives and constraints ask for."""
    if record["status"] == "stopped":
        return "ended early, since it fell behind others"
    if record["status"] != "ok":
        return record.get("error", "unknown")
    wanted = dict.fromkeys(each.metric for each in (*objectives, *constraints))
    lacking = [metric for metric in wanted if not is_number(record["metrics"].get(metric))]
    return f"{', '.join(lacking)} could not be measured" if lacking else None


def excesses(metrics: Mapping[str, float], constraints: Sequence[Constraint]) -> dict[str, float]:
    """By how much each constraint is broken, by its text (`gmacs <= 12`). Samplers learn to stay at or below 0."""
    return {said([each]): float(each.excess(metrics)) for each in constraints if is_number(metrics.get(each.metric))}


def directions(objectives: Sequence[Objective]) -> list[str]:
    """Optuna's words for the directions that objectives are to go in."""
    return ["maximize" if objective.mode == "max" else "minimize" for objective in objectives]
