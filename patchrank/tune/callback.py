"""How trials go: a bar that moves, a line for each that ends, and a note of what became of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ray import tune

from patchrank.config import Objective
from patchrank.io import join, write_json
from patchrank.trial.run import new_record
from patchrank.tune.cluster import available_slots
from patchrank.tune.console import Failure, describe
from patchrank.tune.early_stopping import STEP, VALUE, was_stopped
from patchrank.tune.plan import Plan
from patchrank.tune.prometheus import REFRESH, show_sweep
from patchrank.tune.records import find_outcome
from patchrank.tune.signals import Interrupts
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress, write_line

IDLE = 60.0  # seconds without a running trial after which the user is told why
REDRAW = 1.0  # seconds between two updates of the bar
RETRIES = 2  # of a trial whose worker or node was lost
NO_MEMORY = "its worker was killed by Ray: the node ran out of memory"
SHOWN = ("val_accuracy", "val_knn_accuracy", "val_cosine", "gmacs", "accuracy", "knn_accuracy")


class Running(NamedTuple):
    """A trial under way: the values of its axes, the actor it runs on, and since when."""

    values: dict[str, object]
    actor: object
    began: float


class Progress(tune.Callback):
    """Shows how trials go on, since Ray's own reporting is off, and records those that cannot do so themselves."""

    def __init__(self, plan: Plan, total: int, run: str, failed: dict[str, Failure], interrupts: Interrupts):
        self.plan, self.run, self.left, self.interrupts = plan, run, total, interrupts
        self.bar = progress(total=total, desc="trials", unit="trial", disable=None)  # a log has a line for each trial
        self.running: dict[str, Running] = {}  # by Ray's trial id
        self.failures = dict(failed)  # by trial id
        self.lost: dict[str, dict[str, object]] = {}  # values of trials that are to be tried again, by trial id
        self.one_at_a_time = False
        self._losses: Counter[str] = Counter()  # of workers, by trial id
        self._again = True
        self._best = best_values([row["metrics"] for row in plan.rows()], plan.sweep.config.objectives)
        self._done = plan.size - plan.missing()
        self._drawn_at = self._exported_at = 0.0
        self._busy_at = time.time()

    def __getstate__(self) -> dict:
        return {}  # Ray pickles its callbacks; a bar does not travel

    def next_round(self) -> bool:
        """Whether there are trials that have yet to run: all of them at first, and then those that were lost."""
        again, self._again = self._again and self.left > 0, False
        return again

    def on_trial_start(self, iteration, trials, trial, **info) -> None:
        self.running[trial.trial_id] = Running(trial.config["values"], trial.temporary_state.ray_actor, time.time())

    def on_step_end(self, iteration, trials, **info) -> None:
        """Shows how far the sweep is. Where nothing has run for a while, says why: Ray would wait in silence."""
        config, now = self.plan.sweep.config, time.time()
        self.interrupts.check()
        if now - self._drawn_at > REDRAW:
            self._drawn_at = now
            self.bar.set_postfix_str(f"{len(self.running)} running", refresh=True)
        if now - self._exported_at > REFRESH:
            self._exported_at = now
            show_sweep(config.name, self.plan.size, self._done, len(self.failures), self._best)
        if self.running:
            self._busy_at = now
        elif now - self._busy_at > IDLE:
            self._busy_at = now
            try:
                available_slots(config.resources)
            except UserError as error:
                write_line(f"waiting: {error}")

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        self._end(self._remove(trial), trial.last_result or {})

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        """A worker that was lost may still have left a record, or the reason why it ended itself."""
        lost, outcome = self._remove(trial), None
        with suppress(UserError):  # a store that cannot be asked now
            identity = self.plan.identify(self.plan.trial(lost.values))
            outcome = find_outcome(self.plan.sweep.config.root, identity, self.run)
        if outcome is None:
            self._lose(lost.values, _cause(trial.error_file))
        else:
            self._end(lost, outcome)

    def out_of_memory(self, message: str) -> None:
        """Notes that Ray has killed workers for the memory that they took.

        The trial that Ray's message names is to blame, or the only one that ran. If there is no such trial, none is
        blamed yet, and all are tried again one at a time.
        """
        running = list(self.running.values())
        named = [each for each in running if each.actor and actor_id(each.actor) in message]
        self.one_at_a_time |= not named
        for each in running if len(running) == 1 else named:
            self._lose(each.values, NO_MEMORY)
        self.running.clear()
        self._again = True

    def _remove(self, trial) -> Running:
        """Takes a trial that has ended off the running ones. One whose actor was lost early may not be among them."""
        return self.running.pop(trial.trial_id, Running(trial.config["values"], None, time.time()))

    def _end(self, trial: Running, found: dict) -> None:
        if "id" in found:
            figures = ", ".join(f"{key} {found[key]:.4g}" for key in SHOWN if key in found)
            self._best = best_values([self._best, found], self.plan.sweep.config.objectives)
            self._done += 1
            self._finish(trial.values, f"{figures} ({time.time() - trial.began:.0f} s)")
        elif was_stopped(found):  # is recorded, so that no later run begins it again
            self._done += 1
            text = f"ended after step {found[STEP]} at {found[VALUE]:.4g}, behind others"
            asha, reached = self.plan.sweep.config.search.asha, {key: found[key] for key in (STEP, VALUE)}
            self._finish(trial.values, text, "stopped", asha=asha.model_dump(), reached=reached, metrics={})
        else:
            self._fail(trial.values, found.get("failure", "it ended without reporting anything"))

    def _lose(self, values: dict[str, object], cause: str) -> None:
        """Lets a trial whose worker was lost run again, up to `RETRIES` times."""
        identity = self.plan.identify(self.plan.trial(values))
        self._losses[identity] += 1
        if self._losses[identity] > RETRIES:
            self._fail(values, cause)
        else:
            self._again = True
            self.lost[identity] = values
            write_line(f"  {describe(values)}: is to be tried again ({cause})")

    def _fail(self, values: dict[str, object], cause: str) -> None:
        """Records a failure, which a trial whose worker was lost could not do itself."""
        self.failures[self.plan.identify(self.plan.trial(values))] = Failure(values, cause)
        self._finish(values, cause, "error", error=cause, run=self.run)

    def _finish(self, values: dict[str, object], text: str, status: str = "ok", **content) -> None:
        """Tells how a trial ended and counts it; records those that are not `ok`, which have no record of their own."""
        write_line(f"  {describe(values)}: {text}")
        self.left -= 1
        self.bar.update()
        if status != "ok":
            trial, config = self.plan.trial(values), self.plan.sweep.config
            identity = self.plan.identify(trial)
            record = new_record(trial, identity, config.name, status, **content)
            with suppress(UserError):  # Tune must not end because of a store, and the report at the end still tells
                write_json(join(config.root, "trials", f"{identity}.{status}.json"), record)


def best_values(rows: Iterable[dict], objectives: Iterable[Objective]) -> dict[str, float]:
    """The best value of each objective that any row of metrics has."""
    best: dict[str, float] = {}
    for each in objectives:
        values = [row[each.metric] for row in rows if each.metric in row]
        if values:
            best[each.metric] = max(values) if each.mode == "max" else min(values)
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
