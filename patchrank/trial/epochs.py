"""Who hears of a trial while it trains, so that one that falls behind others can end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Pulse = Callable[[str, int, int], None]  # hears what is trained, and how many of how many epochs are done


@dataclass
class Steps:
    """A listener to a trial's steps: values by which trials are compared while they run, so that one can be ended.

    A step is an epoch of what a trial trains. Steps count from 1 over all trainings, in the order of the tasks: with n
    epochs each, epoch e of the first training is step e, and epoch e of the second is step n + e. Listening changes
    nothing about what is trained. A training whose result an earlier trial left behind has no steps.

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
