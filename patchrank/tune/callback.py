"""Trials as they go: a bar that moves, a line per finished one, and what became of each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ray.tune import Callback

from patchrank.config import Objective
from patchrank.io import join, write_json
from patchrank.trial.run import error_record, stopped_record
from patchrank.tune.cluster import available_slots
from patchrank.tune.console import Failure, describe
from patchrank.tune.early_stopping import STEP, VALUE, was_stopped
from patchrank.tune.plan import Plan
from patchrank.tune.prometheus import REFRESH, show_sweep
from patchrank.tune.records import find_outcome
from patchrank.tune.signals import Interrupts
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress, write_line

IDLE = 60.0  # seconds without a trial after which somebody should know why
REDRAW = 1.0  # seconds after which the bar shows anew how many trials run
RETRIES = 2  # of a trial whose worker or node was lost
NO_MEMORY = "its worker was killed by Ray: the node ran out of memory"
SHOWN = ("val_accuracy", "val_cosine", "gmacs", "accuracy")


class Running(NamedTuple):
    """A trial under way: the values of its axes, the actor it runs on, and since when."""

    values: dict[str, object]
    actor: object
    began: float


class Progress(Callback):
    """Shows how trials go on, since Ray's own reporting is off, and records those that cannot do so themselves."""

    def __init__(self, plan: Plan, total: int, run: str, failed: dict[str, Failure], interrupts: Interrupts):
        self.plan, self.run, self.left, self.interrupts = plan, run, total, interrupts
        self.bar = progress(total=total, desc="trials", unit="trial", disable=None)  # a log has a line for each trial
        self.running: dict[str, Running] = {}  # by Ray's trial id
        self.failures = dict(failed)  # by trial id
        self.lost: dict[str, dict[str, object]] = {}  # of trials that are to come round again: values, by trial id
        self.one_at_a_time = False
        self._losses: Counter[str] = Counter()  # of workers, by trial id
        self._again = True
        self._best = best_values(plan.rows(), plan.sweep.config.objectives)
        self._done = plan.size - plan.missing()
        self._shown = self._gauged = 0.0
        self._busy = time.time()

    def __getstate__(self) -> dict:
        return {}  # Ray pickles its callbacks; a bar does not travel

    def next_round(self) -> bool:
        """Whether there are trials that have yet to run: all of them at first, and then those that were lost."""
        again, self._again = self._again and self.left > 0, False
        return again

    def on_trial_start(self, iteration, trials, trial, **info) -> None:
        self.running[trial.trial_id] = Running(trial.config["values"], trial.temporary_state.ray_actor, time.time())
        self._show()

    def on_step_end(self, iteration, trials, **info) -> None:
        self.interrupts.check()
        self._show()
        self._gauge()
        self._wonder()

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        self._end(self._ended(trial), trial.last_result or {})

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        """A worker that was lost may still have left a record, or the reason why it ended itself."""
        lost, config, left = self._ended(trial), self.plan.sweep.config, None
        with suppress(UserError):  # a store that cannot be asked now
            left = find_outcome(config.root, self.plan.identify(self.plan.trial(lost.values)), self.run)
        if left is None:
            self._lose(lost.values, _cause(trial.error_file))
        else:
            self._end(lost, left)

    def out_of_memory(self, message: str) -> None:
        """Takes note that Ray has killed workers for the memory they took.

        Where it names none that we know, nobody is to blame yet, and the trials come round one at a time.
        """
        running = list(self.running.values())
        named = [each for each in running if each.actor and actor_id(each.actor) in message]
        for each in named or running[: len(running) == 1]:
            self._lose(each.values, NO_MEMORY)
        self.one_at_a_time = self.one_at_a_time or not named
        self.running.clear()
        self._again = True

    def _ended(self, trial) -> Running:
        """What is known of a trial that has ended; an actor may be lost before its trial has been told to start."""
        return self.running.pop(trial.trial_id, Running(trial.config["values"], None, time.time()))

    def _end(self, trial: Running, found: dict) -> None:
        if "id" in found:
            figures = ", ".join(f"{key} {found[key]:.4g}" for key in SHOWN if key in found)
            self._say(trial.values, f"{figures} ({time.time() - trial.began:.0f} s)")
            self._best = best_values([{"metrics": self._best}, {"metrics": found}], self.plan.sweep.config.objectives)
            self._count()
        elif was_stopped(found):
            self._stop(trial.values, found)
        else:
            self._fail(trial.values, found.get("failure", "it ended without reporting anything"))

    def _lose(self, values: dict[str, object], cause: str) -> None:
        identity = self.plan.identify(self.plan.trial(values))
        self._losses[identity] += 1
        if self._losses[identity] > RETRIES:
            self._fail(values, cause)
        else:
            self._again = True
            self.lost[identity] = values
            self._say(values, f"is to be tried again ({cause})")

    def _stop(self, values: dict[str, object], found: dict) -> None:
        """Records that a trial was ended early, so that no later run begins it again."""
        settings, config = self.plan.trial(values), self.plan.sweep.config
        identity, reached = self.plan.identify(settings), {key: found[key] for key in (STEP, VALUE)}
        self._say(values, f"ended after step {found[STEP]} at {found[VALUE]:.4g}, behind others")
        self._count()
        record = stopped_record(settings, identity, config.name, config.search.asha.model_dump(), reached)
        self._write(f"{identity}.stopped.json", record)

    def _fail(self, values: dict[str, object], cause: str) -> None:
        """Notes a failure; one that the trial could not write down itself is written down here."""
        settings, config = self.plan.trial(values), self.plan.sweep.config
        identity = self.plan.identify(settings)
        self.failures[identity] = Failure(values, cause)
        self._say(values, cause)
        self._count(done=False)
        self._write(f"{identity}.error.json", error_record(settings, identity, config.name, cause) | {"run": self.run})

    def _write(self, name: str, record: dict) -> None:
        """Writes a record, if its store takes it: Tune must not end for that, and the report at the end still tells."""
        with suppress(UserError):
            write_json(join(self.plan.sweep.config.root, "trials", name), record)

    def _count(self, done: bool = True) -> None:
        self.left -= 1
        self._done += done
        self.bar.update()

    def _say(self, values: dict[str, object], text: str) -> None:
        write_line(f"  {describe(values)}: {text}")

    def _gauge(self) -> None:
        """Keeps Ray's metrics up to date, as often as they want it."""
        if time.time() - self._gauged > REFRESH:
            self._gauged = time.time()
            show_sweep(self.plan.sweep.config.name, self.plan.size, self._done, len(self.failures), self._best)

    def _wonder(self) -> None:
        """Says so where nothing has run for a while since no node is left that holds a trial: Ray would only wait."""
        if self.running:
            self._busy = time.time()
        elif time.time() - self._busy > IDLE:
            self._busy = time.time()
            try:
                available_slots(self.plan.sweep.config.resources)
            except UserError as error:
                write_line(f"waiting: {error}")

    def _show(self) -> None:
        if time.time() - self._shown > REDRAW:
            self._shown = time.time()
            self.bar.set_postfix_str(f"{len(self.running)} running", refresh=True)


def best_values(rows: Iterable[dict], objectives: Iterable[Objective]) -> dict[str, float]:
    """The best value of each objective that any row has."""
    best: dict[str, float] = {}
    for each in objectives:
        values = [row["metrics"][each.metric] for row in rows if each.metric in row["metrics"]]
        best |= {each.metric: (max if each.mode == "max" else min)(values)} if values else {}
    return best


def actor_id(actor: object) -> str:
    """The hexadecimal id by which Ray's messages name an actor, from how its handle prints: `Actor(Worker, 0a1b)`.

    A handle that prints otherwise gives a text that no message has, so that nobody is blamed by mistake.
    """
    return repr(actor).rpartition(", ")[2].removesuffix(")")


def _cause(error_file: str | None) -> str:
    """What ended a trial, from the traceback that Ray keeps: the only trace where a worker died."""
    text = Path(error_file).read_text() if error_file and Path(error_file).exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or "worker process has died" in text or "ActorDiedError" in text:
        return "its worker process died, or the node under it"
    return lines[-1]
