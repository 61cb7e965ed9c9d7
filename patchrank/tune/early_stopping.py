"""Steps under Ray: what a worker reports of a running trial, and the scheduler that ends trials that fall behind.

A trial waits inside every report until Ray lets it go on. Where the scheduler ends it, its thread stays in that wait,
and its actor is kept for the next trial. Before that one starts, Ray makes the report raise SystemExit and waits until
the thread is gone, so that no two trials ever work on the same inputs at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from patchrank.config import AshaConfig
from patchrank.trial.epochs import Steps
from patchrank.trial.requirements import TrialContext
from patchrank.utils.errors import UserError

if TYPE_CHECKING:
    from ray.tune.schedulers import ASHAScheduler

STEP, VALUE = "step", "step_value"  # keys of a report that is no result yet


def reporting(asha: AshaConfig) -> Steps:
    """What a worker hands to `run_trial`; for one trial alone."""
    from ray import tune

    # Ray reads this in the worker. Its own 2 s are too short for a step, and the trial that comes next would fail.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "300")
    return Steps(asha.of, lambda step, value: tune.report({STEP: step, VALUE: value}))


def asha_scheduler(asha: AshaConfig, num_steps: int) -> ASHAScheduler:
    """Compares trials after `grace` steps and at every multiple of that by powers of `reduction`.

    It never ends a trial after its last step: the rest of such a trial costs little, and its result is worth more.

    Args:
        num_steps: the most that a trial of the sweep has (`TrialContext.num_steps`).

    Raises:
        UserError: no trial has enough steps for anything to be ended.
    """
    if num_steps == 0:
        raise UserError(f"search.asha.of is {asha.of!r}, but no trial of this sweep trains one")
    if asha.grace >= num_steps:
        rule = f"must be below the {num_steps} steps of a trial, or none would be ended; try {max(1, num_steps // 4)}"
        raise UserError(f"search.asha.grace is {asha.grace}, but {rule}")
    from ray.tune.schedulers import ASHAScheduler

    rungs = {"max_t": num_steps - 1, "grace_period": asha.grace, "reduction_factor": asha.reduction}
    return ASHAScheduler(time_attr=STEP, metric=VALUE, mode="max", stop_last_trials=False, **rungs)


def create_scheduler(asha: AshaConfig | None, trials: Iterable[TrialContext]) -> ASHAScheduler | None:
    """What ends trials early; None where all run to their end. Raises `UserError` where none of them could be ended."""
    if asha is None:
        return None
    return asha_scheduler(asha, max(trial.num_steps(asha.of) for trial in trials))


def was_stopped(result: Mapping[str, object]) -> bool:
    """Whether a trial's last report is a step, after which the scheduler ended it, and no result."""
    return VALUE in result and bool(result.get("done"))
