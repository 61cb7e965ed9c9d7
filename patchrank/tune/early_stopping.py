"""Steps under Ray: what a worker tells of a running trial, and the scheduler that ends those that fall behind.

A trial waits inside every report until Ray wants it to go on. One that the scheduler ends is not told so then: its
thread goes on waiting, and its actor is kept for the next trial. Before that one starts, Ray makes the report raise
SystemExit and waits for the thread to be gone, so no two trials ever work on the same inputs at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from patchrank.config import AshaConfig
from patchrank.trial.epochs import Steps
from patchrank.utils.errors import UserError

STEP, VALUE = "step", "step_value"  # keys of a report that is no result yet

# Ray's own patience with a thread that is to end is 2 s, after which the trial that comes next would fail
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "300")


def reporting(asha: AshaConfig) -> Steps:
    """What a worker hands to `run_trial`; for one trial alone."""
    return Steps(asha.of, lambda step, value: tune.report({STEP: step, VALUE: value}))


def asha_scheduler(asha: AshaConfig, num_steps: int) -> ASHAScheduler:
    """Compares trials after `grace` steps and at every multiple of that by powers of `reduction`.

    Never after the last step: what is left by then costs less than it would have cost not to know the result.

    Args:
        num_steps: the most that a trial of the sweep has (`patchrank.trial.run.num_steps`).

    Raises:
        UserError: no trial has enough steps for anything to be ended.
    """
    if num_steps == 0:
        raise UserError(f"search.asha.of is {asha.of!r}, but no trial of this sweep trains one")
    if asha.grace >= num_steps:
        raise UserError(
            f"search.asha.grace is {asha.grace}, but must be below the {num_steps} steps of a trial, or none would be "
            f"ended; near: {max(1, num_steps // 4)}"
        )
    rungs = {"max_t": num_steps - 1, "grace_period": asha.grace, "reduction_factor": asha.reduction}
    return ASHAScheduler(time_attr=STEP, metric=VALUE, mode="max", stop_last_trials=False, **rungs)


def was_stopped(result: Mapping[str, object]) -> bool:
    """Whether the last that was heard of a trial is a step, after which the scheduler ended it."""
    return VALUE in result and bool(result.get("done"))
