"""A trial's steps: values by which trials are compared while they still run, so that one that falls behind can end.

A step is an epoch of what a trial trains. Steps count from 1 over all trainings, in the order of the tasks: with n
epochs each, epoch e of the first training is step e, and epoch e of the second is step n + e. Listening changes nothing
about what is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass
class Steps:
    """A listener to a trial's steps. A training whose result an earlier trial left behind has no steps.

    of: whose epochs count. The value of a `predictor` is its matching rate (%) on val. The value of a `prompt` is the
        accuracy (%) on val with pruning and prompts in force; for distillation it is 100 times the mean cosine to the
        unpruned tower.
    report: takes step and value. It may raise anything to end the trial; `ended` then says that this is no failure.
    """

    of: Literal["predictor", "prompt"]
    report: Callable[[int, float], None]
    ended: bool = False

    def tell(self, step: int, value: float) -> None:
        try:
            self.report(step, value)
        except BaseException:
            self.ended = True
            raise


def listener(steps: Steps | None, of: str, before: int) -> Callable[[int, float], None] | None:
    """A function that takes epoch (from 1) and value of one training and tells them as a step; None if nobody listens.

    Args:
        of: what is trained.
        before: how many steps the trial has before this training.
    """
    if steps is None or steps.of != of:
        return None
    return lambda epoch, value: steps.tell(before + epoch, value)
