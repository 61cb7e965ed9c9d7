"""The sweep from plan to report.

Running is resuming: records say what is done, a fresh Tuner runs what is not, and if nothing is missing Ray is not
even started. `Tuner.restore` is not used: it loses what finished since its last snapshot.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from patchrank.config import Loggers
from patchrank.data.dataset_factory import TASKS
from patchrank.io import check_reachable, check_writable, join, write_atomic
from patchrank.io.lock import hold
from patchrank.report import paper_rows, write_report
from patchrank.tune.best import parse_bounds, write_best
from patchrank.tune.cluster import Where, check_machine, ray_cluster
from patchrank.tune.console import Failure, describe, print_plan, say
from patchrank.tune.dry_run import print_estimate
from patchrank.tune.early_stopping import create_scheduler
from patchrank.tune.exports import export
from patchrank.tune.plan import Job, Plan, check_figures, make_plan
from patchrank.tune.signals import Interrupts
from patchrank.tune.sweep import load_sweep
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
    if not wait >= 0:  # nor nan
        raise UserError(f"--wait must be seconds from 0, but is {wait:g}")
    where = Where(address or os.environ.get("RAY_ADDRESS") or None, wait, dashboard)
    sweep = load_sweep(spec, overrides, quick)
    check_machine(sweep.config.resources, where)
    paper_rows(sweep.config.report.paper)
    if sweep.config.loggers != Loggers():
        from patchrank.tune.loggers import check_trackers  # Ray loads slowly, and a finished sweep does not need it

        check_trackers(sweep.config.loggers)
    for place in (sweep.config.root, sweep.config.shards):
        check_reachable(place)
    plan = make_plan(sweep, fresh, where.address is not None)
    bounds = [] if best is None else [*parse_bounds(best), *sweep.config.constraints]
    if plan.speeds is None and any(bound.metric == "ms" for bound in bounds):
        raise UserError(f"--best {best!r}: this sweep measures no milliseconds; try an objective or constraint on ms")
    missing = plan.size if fresh else plan.missing()
    jobs = plan.jobs() if missing else []
    print_plan(plan, jobs, missing)
    if dry_run:
        print_estimate(plan, jobs, fresh, where)
        return Outcome(plan.rows(), 0)
    words = [str(spec), *overrides, *(["--quick"] if quick else [])]
    outcome = _run(plan, jobs, fresh, where, shlex.join(words))
    if best is not None and outcome.exit_code != 130:
        write_best(plan, outcome.rows, bounds, out)
    return outcome


def is_done(plan: Plan) -> bool:
    """Whether nothing is left to run or to measure. A search has to be asked: its space may hold fewer trials."""
    if plan.missing() and plan.sampled and not plan.untimed():
        from patchrank.tune.search import CellSearch  # Ray and Optuna load slowly, and a finished plan needs neither

        CellSearch(plan).suggest("whether there is anything left")
    return plan.missing() == 0 and not plan.untimed()


def _run(plan: Plan, jobs: list[Job], fresh: bool, where: Where, command: str) -> Outcome:
    """Runs what is missing, if anything is, and writes the report."""
    config, interrupts, failed = plan.sweep.config, Interrupts(), {}
    if not fresh and is_done(plan):
        return _conclude(plan, failed, interrupts, command)
    check_figures(plan)
    create_scheduler(config.search.asha, map(plan.context, plan.staged()))  # it refuses rules that end no trial
    check_writable(config.shards)  # better now than after the first trial
    check_writable(config.root)
    with hold(config.root, f"sweep {config.name}") as lost:
        interrupts.lost = lost
        plan.refresh()  # another driver may have been at work until now
        try:
            # Ray installs a signal handler of its own when it starts, so ours is installed after
            with ray_cluster(config.resources, where, config.imports) as session, interrupts.caught():
                from patchrank.tune.ray_tasks import stage

                stage(plan, jobs, session.outlives_us)
                if fresh:  # only now, so that nothing that goes wrong earlier costs a record
                    interrupts.raise_if_lost()
                    plan.forget()
                while _round(plan, session.slots, interrupts, failed):
                    pass
        except KeyboardInterrupt:
            interrupts.happened = True
        return _conclude(plan, failed, interrupts, command)


def _round(plan: Plan, slots: int, interrupts: Interrupts, failed: dict[str, Failure]) -> bool:
    """Runs trials and then measures their milliseconds; returns whether there is to be another round.

    There is one where a search is to learn from milliseconds and has trials left. Trials that fail are added to
    `failed`, by id.
    """
    learns_from_time = bool(plan.sampled) and plan.speeds is not None
    left = plan.missing() - len(failed)
    if left > 0:
        count = min(left, plan.sweep.config.search.round) if learns_from_time else left
        from patchrank.tune.tuner import run_trials

        failed |= run_trials(plan, count, slots, interrupts, failed)
        plan.refresh()
    if interrupts.happened:
        return False
    if untimed := plan.untimed():
        from patchrank.tune.ray_tasks import measure_alone

        measure_alone(untimed, plan.sweep.config, interrupts.raise_if_lost)
        plan.refresh()
    return learns_from_time and 0 < plan.missing() - len(failed) < left


def _conclude(plan: Plan, failed: dict[str, Failure], interrupts: Interrupts, command: str) -> Outcome:
    """Rebuilds results and report from the records that belong to the plan, and says how it went."""
    interrupts.raise_if_lost()
    plan.refresh()
    rows, config = plan.rows(), plan.sweep.config
    unfinished, untimed = plan.missing(), len(plan.untimed())
    told = {record["id"]: Failure(values, record["error"]) for values, record in plan.failures()}
    told |= {identity: failure for identity, failure in failed.items() if not plan.record(identity)}
    write_atomic(join(config.root, "results.jsonl"), "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    if rows or told:
        about = {"objectives": config.objectives, "constraints": config.constraints}
        about["stopped"] = len(plan.rows("stopped"))
        about["failures"] = [(describe(failure.values), failure.cause) for failure in told.values()]
        about["sampled"] = [key for key, rule in plan.sweep.axes.items() if rule.kind != "grid"]
        about["credits"] = {name: task.credit for name, task in TASKS.items() if task.credit}
        report = write_report(rows, config.root, config.report, list(plan.sweep.axes), command, unfinished, **about)
        say(f"\n{report.table}\n\nreport: {report.path}")
        export(plan, rows)
    for failure in told.values():
        say(f"failed: {describe(failure.values)}: {failure.cause}")
    if untimed:
        say(f"{untimed} trials have no milliseconds; running again measures them")
    if interrupts.happened and (unfinished or untimed):
        say(f"interrupted with {unfinished} trials to go; running again goes on from here")
        return Outcome(rows, 130)
    if unfinished:
        say(f"{unfinished} trials are not done; running again tries them again")
    return Outcome(rows, 1 if unfinished or untimed else 0)
