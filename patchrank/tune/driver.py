"""The sweep from plan to report.

Running is resuming: records say what is done, a fresh Tuner runs what is not, and if nothing is missing Ray is not
even started. `Tuner.restore` is not used: it loses what finished since its last snapshot.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from patchrank.config import Constraint
from patchrank.data.dataset_factory import TASKS
from patchrank.io import check_reachable, check_writable, join, write_atomic
from patchrank.io.lock import hold
from patchrank.report import Report, paper_rows, write_report
from patchrank.tune.best import parse_bounds, write_best
from patchrank.tune.cluster import Where, check_machine, ray_cluster
from patchrank.tune.console import Failure, print_plan, say
from patchrank.tune.forecast.lines import forecast
from patchrank.tune.loggers import check_trackers
from patchrank.tune.plan import Plan, make_plan
from patchrank.tune.ray_tasks import Job, measure_alone, stage, staging_jobs
from patchrank.tune.signals import Interrupts
from patchrank.tune.studies import export
from patchrank.tune.sweep import load_sweep
from patchrank.tune.tuner import create_scheduler, is_done, run_trials
from patchrank.utils.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """rows: finished trials in plan order; exit_code: 0 all done, 1 some failed, 130 interrupted."""

    rows: list[dict]
    exit_code: int


def run_sweep(
    spec: str,
    overrides: Sequence[str] = (),
    quick: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    address: str | None = None,
    wait: float = 0.0,
    dashboard: bool = False,
    best: str | None = None,
    out: str | None = None,
) -> Outcome:
    """Runs what is missing of a sweep and writes `results.jsonl` and the report.

    Raises:
        UserError: bad input, before anything has started or been written.
    """
    if wait < 0:
        raise UserError(f"--wait must be seconds from 0, but is {wait:g}")
    where = Where(address or os.environ.get("RAY_ADDRESS") or None, wait, dashboard)
    sweep = load_sweep(spec, overrides, quick)
    check_machine(sweep.config.resources, where)
    paper_rows(sweep.config.report.paper)
    check_trackers(sweep.config.loggers)
    for place in (sweep.config.root, sweep.config.shards):
        check_reachable(place)
    plan = make_plan(sweep, fresh, where.address is not None)
    bounds = _bounds(plan, best)
    missing = plan.size if fresh else plan.missing()
    jobs = staging_jobs(plan) if missing else []
    print_plan(plan, jobs, missing)
    if dry_run:
        forecast(plan, jobs, fresh, where)
        return Outcome(plan.rows(), 0)
    outcome = _run(plan, jobs, fresh, where, " ".join([str(spec), *overrides]) + " --quick" * quick)
    if bounds is not None and outcome.exit_code != 130:
        write_best(plan, outcome.rows, bounds, out)
    return outcome


def _bounds(plan: Plan, best: str | None) -> list[Constraint] | None:
    """What a trial must keep to be chosen, the sweep's own bounds among it; None where none is to be chosen."""
    if best is None:
        return None
    bounds = parse_bounds(best)
    if plan.speeds is None and any(bound.metric == "ms" for bound in bounds):
        raise UserError(f"--best {best!r}: this sweep measures no milliseconds; near: an objective or constraint on ms")
    return [*bounds, *plan.sweep.config.constraints]


def _run(plan: Plan, jobs: list[Job], fresh: bool, where: Where, command: str) -> Outcome:
    """Runs what is missing, if anything is, and writes the report."""
    if not fresh and is_done(plan):
        return _conclude(plan, {}, Interrupts(), command)
    create_scheduler(plan)
    check_writable(plan.sweep.config.shards)  # better now than after the first trial
    check_writable(plan.sweep.config.root)
    interrupts, failed = Interrupts(), {}
    with hold(plan.sweep.config.root, f"sweep {plan.sweep.config.name}") as held:
        interrupts.lost = held.lost
        plan.refresh()  # another driver may have been at work until now
        try:
            _work(plan, jobs, fresh, where, interrupts, failed)
        except KeyboardInterrupt:
            interrupts.happened = True
        return _conclude(plan, failed, interrupts, command)


def _work(
    plan: Plan, jobs: list[Job], fresh: bool, where: Where, interrupts: Interrupts, failed: dict[str, Failure]
) -> None:
    """Stages shards and runs what is missing; notes in `failed` trials that failed, by id."""
    config = plan.sweep.config
    # Ray puts a handler of its own in place of ours when it starts, so ours comes after
    with ray_cluster(config.resources, where, config.imports) as slots, interrupts.caught():
        stage(plan, jobs)
        if fresh:  # only now: whatever went wrong before has cost no record
            interrupts.insist()
            plan.forget()
        while _round(plan, slots, interrupts, failed):
            pass


def _round(plan: Plan, slots: int, interrupts: Interrupts, failed: dict[str, Failure]) -> bool:
    """Trials, and then their milliseconds; whether there is to be another, as a search that learns from those has."""
    learns_from_time = bool(plan.sampled) and plan.speeds is not None
    left = plan.missing() - len(failed)
    if left > 0:
        count = min(left, plan.sweep.config.search.round) if learns_from_time else left
        failed |= run_trials(plan, count, slots, interrupts, failed)
        plan.refresh()
    if interrupts.happened:
        return False
    if untimed := plan.untimed():
        measure_alone(untimed, plan.sweep.config, interrupts.insist)
        plan.refresh()
    return learns_from_time and 0 < plan.missing() - len(failed) < left


def _conclude(plan: Plan, failed: dict[str, Failure], interrupts: Interrupts, command: str) -> Outcome:
    """Rebuilds results and report from the records that belong to the plan, and says how it went."""
    interrupts.insist()
    plan.refresh()
    rows, root, unfinished, untimed = plan.rows(), plan.sweep.config.root, plan.missing(), len(plan.untimed())
    told = {record["id"]: Failure(values, record["error"]) for values, record in plan.failures()}
    told |= {identity: failure for identity, failure in failed.items() if not plan.record(identity)}
    write_atomic(join(root, "results.jsonl"), "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    if rows or told:
        report = _report(plan, rows, told, command, unfinished)
        say(f"\n{report.table}\n\nreport: {report.path}")
        export(plan, rows)
    for failure in told.values():
        say("failed: {}: {}".format(*failure.told()))
    if untimed:
        say(f"{untimed} trials have no milliseconds; running again measures them")
    if interrupts.happened and (unfinished or untimed):
        say(f"interrupted with {unfinished} trials to go; running again goes on from here")
        return Outcome(rows, 130)
    if unfinished:
        say(f"{unfinished} trials are not done; running again tries them again")
    return Outcome(rows, 1 if unfinished or untimed else 0)


def _report(plan: Plan, rows: list[dict], failed: dict[str, Failure], command: str, unfinished: int) -> Report:
    config = plan.sweep.config
    told = {"objectives": config.objectives, "constraints": config.constraints}
    told |= {"failures": [failure.told() for failure in failed.values()], "stopped": len(plan.stopped())}
    told["credits"] = {name: task.credit for name, task in TASKS.items() if task.credit}
    return write_report(rows, config.root, config.report, list(plan.sweep.axes), command, unfinished, **told)
