"""`--status`: how far a sweep is, from what lies in its root. Reads alone, so it works beside a driver, anywhere."""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from patchrank.config import Objective
from patchrank.io import check_reachable, list_names
from patchrank.io.lock import Holder, find_holder
from patchrank.tune.best import choose
from patchrank.tune.console import describe
from patchrank.tune.marks import marks
from patchrank.tune.plan import Plan, make_plan
from patchrank.tune.sweep import load_sweep
from patchrank.utils.errors import UserError

SHORT = 8  # characters of an id that are shown; `--stop` takes any that are unique
SHOWN = 16  # lines of one kind


class Look(NamedTuple):
    """A sweep as it stands in its root.

    driver: who works there, or did until it was killed.
    running: marks of its trials, by id; out of date where no driver is alive.
    others: how many more marks there are, of trials that are not in this plan.
    """

    plan: Plan
    driver: Holder | None
    running: dict[str, dict]
    others: int

    @property
    def is_driven(self) -> bool:
        return self.driver is not None and self.driver.is_alive

    @property
    def failed(self) -> list[tuple[dict[str, object], dict]]:
        """As `Plan.failures`, without trials that run again now."""
        return [(values, record) for values, record in self.plan.failures() if record["id"] not in self.running]

    @property
    def waiting(self) -> int:
        """Trials that have not begun, or, without a driver, that are not done."""
        return max(0, self.plan.missing() - len(self.failed) - len(self.running))


def look_at(spec: str, overrides: Sequence[str], quick: bool) -> Look:
    """Reads what there is. Starts no Ray, takes no lock and writes nothing.

    Raises:
        UserError: as `make_plan`, or a store that does not answer.
    """
    sweep = load_sweep(spec, overrides, quick)
    for place in (sweep.config.root, sweep.config.shards):
        check_reachable(place)
    driver, found = find_holder(sweep.config.root), marks(sweep.config.root)
    plan = make_plan(sweep, on_cluster=True)  # after the marks, so that what ended meanwhile counts as done
    planned = {plan.identify(plan.trial(cell.values)) for cell in plan.cells}
    own = [mark for mark in found if mark["id"] in planned or (plan.sampled and mark["sweep"] == sweep.config.name)]
    running = {mark["id"]: mark for mark in own if plan.record(mark["id"]) is None}
    return Look(plan, driver, running, len(found) - len(own))


def print_status(spec: str, overrides: Sequence[str], quick: bool) -> int:
    """Prints how far a sweep is, on stdout; returns the exit status, which is 0."""
    look = look_at(spec, overrides, quick)
    command = shlex.join(["python", "-m", "patchrank.tune", spec, *overrides, *(["--quick"] if quick else [])])
    for line in [*_counts(look), *_trials(look), *_best(look.plan), *_next(look, command)]:
        print(line)
    return 0


def _counts(look: Look) -> list[str]:
    """How many trials are where, and who works at them."""
    plan, driver = look.plan, look.driver
    counts = {"done": len(plan.rows()), "running": len(look.running), "failed": len(look.failed)}
    if not look.is_driven and look.running:
        counts["cut off"] = counts.pop("running")
    by_hand = len(plan.stopped_by_hand())
    counts |= {"stopped by hand": by_hand, "ended early": len(plan.rows("stopped")) - by_hand, "waiting": look.waiting}
    told = [f"{count} {what}" for what, count in counts.items() if count or what in ("done", "running", "failed")]
    lines = [f"sweep {plan.sweep.config.name} in {plan.sweep.config.root}", f"{plan.size} trials: {', '.join(told)}"]
    if driver is None:
        return [*lines, "driver: none"]
    sign = "it refreshes its note" if driver.is_alive else "no sign of life"
    if driver.idle is not None:
        sign = f"last sign of life {_span(driver.idle)} ago"
    return [*lines, f"driver: {'' if driver.is_alive else 'gone: '}{driver.who}; {sign}", *_shards(plan)]


def _shards(plan: Plan) -> list[str]:
    """A line for each set of golden shards that is not complete, by its list of files."""
    lines = {}
    for trial in plan.staged():
        for split, folder in plan.context(trial).needed_shards.values():
            made = sum(name.startswith("shard-") and name.endswith(".json") for name in list_names(folder.path))
            if made < len(folder.sizes):
                lines[folder.key] = f"golden shards of {split.task}/{split.split}: {made} of {len(folder.sizes)} made"
    return list(lines.values())


def _trials(look: Look) -> list[str]:
    """Trials that run, that failed and that somebody ended, a line each."""
    running = [_row(mark["id"], _running(mark, look.is_driven)) for mark in look.running.values()]
    failed = [_row(each["id"], f"{describe(values)}: {_last_line(each['error'])}") for values, each in look.failed]
    stopped = [_row(each["id"], describe(values)) for values, each in look.plan.stopped_by_hand()]
    head = "running" if look.is_driven else "cut off when their driver ended"
    lines = [*_listed(head, running), *_listed("failed", failed), *_listed("stopped by hand", stopped)]
    if look.others:
        lines.append(f"and {look.others} trials that are not in this plan")
    return lines


def _listed(head: str, lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"{head}:", *lines[:SHOWN], *more] if lines else []


def _running(mark: dict, is_driven: bool) -> str:
    """A running trial in words. Of another host's clock only what it shows itself is told."""
    age = mark["seconds"]
    is_here = mark["host"] == socket.gethostname()
    if is_here and is_driven:
        age += max(0.0, time.time() - mark["written"])
    since = f"since {mark['since']}" + ("" if is_here else " by its clock")
    lasted = f"for {_span(age)}" + ("" if is_here and is_driven else " when last heard of")
    epoch = f", {mark['of']} epoch {mark['epoch']} of {mark['epochs']}" if "epoch" in mark else ""
    return f"{describe(mark['values'])}; on {mark['host']} (pid {mark['pid']}), {since}, {lasted}{epoch}"


def _row(identity: str, words: str) -> str:
    return f"  {identity[:SHORT]}  {words}"


def _last_line(error: str) -> str:
    """The last line of an error, which says what it was."""
    return ([line.strip() for line in error.splitlines() if line.strip()] or ["unknown"])[-1]


def _best(plan: Plan) -> list[str]:
    """The best trial so far by each objective, among those that keep the sweep's bounds."""
    rows, lines = plan.rows(), []
    swept = {row["id"]: cell.values | drawn for cell in plan.cells for row, drawn in plan.records_of(cell)}

    def told(objective: Objective) -> str:
        row = choose(rows, [objective, *plan.sweep.config.objectives], plan.sweep.config.constraints)
        return f"{row['metrics'][objective.metric]:.6g} by {row['id'][:SHORT]}  {describe(swept[row['id']])}"

    for objective in plan.sweep.config.objectives if rows else ():
        try:
            lines.append(f"best {objective.metric} so far: {told(objective)}")
        except UserError as error:
            lines.append(f"best {objective.metric} so far: {error}")
    return lines


def _next(look: Look, command: str) -> list[str]:
    """What can be done from here."""
    left = look.plan.missing() + len(look.plan.untimed())
    if look.is_driven and look.running:
        return [f"to end one of them: {command} --stop {next(iter(look.running))[:4]}"]
    if look.is_driven:
        return ["no trial runs at this moment: Ray starts, golden shards or milliseconds are made, or all is written"]
    return [f"to go on: {command}"] if left else ["nothing is left to run"]


def _span(seconds: float) -> str:
    """A time in words: `12 s`, `3 min`, `2.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
