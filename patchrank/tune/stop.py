"""`--stop ID`: asks the driver of a running sweep to end one trial."""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.tune.console import describe
from patchrank.tune.marks import EVERY, request_stop
from patchrank.tune.status import SHORT, Look, look_at
from patchrank.utils.errors import UserError


def stop_trial(spec: str, overrides: Sequence[str], quick: bool, prefix: str) -> int:
    """Leaves a request beside the mark of a running trial; returns the exit status, which is 0.

    Args:
        prefix: the beginning of the trial's id, enough of it to be unique among all trials of the sweep.

    Raises:
        UserError: no trial, or several, whose id begins so; a trial that is not running; a driver that is gone.
    """
    look = look_at(spec, overrides, quick)
    identity, words, state = _find(look, prefix)
    what = f"{identity[:SHORT]} ({words})"
    if state != "running":
        raise UserError(f"--stop {prefix}: {what} is {state}, and only a running trial can be ended")
    request_stop(look.plan.sweep.config.root, identity)
    print(f"asked for the end of {what}; its driver looks every {EVERY:.0f} s, and --status tells")
    return 0


def _find(look: Look, prefix: str) -> tuple[str, str, str]:
    """The trial whose id begins so: its id, its settings in words, and what it is."""
    known = _states(look)
    found = [identity for identity in known if prefix and identity.startswith(prefix)]
    running = ", ".join(identity[:SHORT] for identity in look.running) if look.is_driven else ""
    if not found:
        raise UserError(f"--stop {prefix}: no trial of this sweep has such an id; running: {running or 'none'}")
    if len(found) > 1:
        some = ", ".join(f"{identity[:SHORT]} ({known[identity][1]})" for identity in sorted(found)[:SHORT])
        raise UserError(f"--stop {prefix}: {len(found)} ids begin so; give more characters of one: {some}")
    return found[0], *known[found[0]]


def _states(look: Look) -> dict[str, tuple[str, str]]:
    """All trials of a sweep that anybody knows of, by id: settings in words, and what they are."""
    plan, known = look.plan, {}
    if not plan.sampled:
        known = {plan.identify(plan.trial(cell.values)): (cell.values, "waiting") for cell in plan.cells}
    known |= {record["id"]: (values, "failed") for values, record in plan.failures()}
    for cell in plan.cells:
        for record, drawn in plan.records_of(cell):
            state = "stopped by hand" if record.get("by_hand") else "ended early"
            known[record["id"]] = cell.values | drawn, "done" if record["status"] == "ok" else state
    under_way = "running" if look.is_driven else "cut off, since its driver is gone"
    known |= {identity: (mark["values"], under_way) for identity, mark in look.running.items()}
    return {identity: (describe(values), state) for identity, (values, state) in known.items()}
