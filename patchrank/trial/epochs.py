"""A trial's steps: what it can be compared with others by while it still runs, so that one that falls behind can end.

A step is an epoch of what a trial trains, counted from 1 over all its trainings in the order of its tasks: with n
epochs each, epoch e of the first is step e, and epoch e of the second n + e. What is trained does not depend on who
listens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass
class Steps:
    """Who hears of a trial's steps, and of which.

    A training that is not needed, since an earlier trial left its result, has no steps: little is left to be saved.

    of: `predictor`, whose value is the matching rate (%) on val of what is fitted, or `prompt`, whose value is the
    accuracy (%) on val with pruning and prompts in force, or for distillation 100 times the mean cosine to the unpruned
    tower. report(step, value) may raise whatever it likes to end the trial, which is then no failure: `ended` says so.
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
    """What hears of each epoch, from 1, of a training, and its value; None where nobody wants to.

    Args:
        before: how many steps lie before the training's first.
    """
    if steps is None or steps.of != of:
        return None
    return lambda epoch, value: steps.tell(before + epoch, value)
