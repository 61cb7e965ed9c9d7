"""The sweep from plan to report.

Running is resuming: records say what is done, a fresh Tuner runs what is not, and if nothing is missing Ray is not
even started. `Tuner.restore` is not used: it loses what finished since its last snapshot.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from patchrank.files import check_writable, join, write_atomic
from patchrank.report import paper_rows, write_report
from patchrank.tune.cluster import check_machine, ray_cluster
from patchrank.tune.plan import Plan, make_plan
from patchrank.tune.progress import print_plan, say
from patchrank.tune.spec import load_sweep
from patchrank.tune.staging import Job, stage, staging_jobs


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
    plan_only: bool = False,
    address: str | None = None,
) -> Outcome:
    """Runs what is missing of a sweep and writes `results.jsonl` and the report.

    Raises:
        UserError: bad input, before anything has started or been written.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    sweep = load_sweep(spec, overrides, quick)
    check_machine(sweep.config.resources, address)
    paper_rows(sweep.config.report.paper)
    plan = make_plan(sweep)
    missing = plan.size if fresh else plan.missing()
    jobs = staging_jobs(plan) if missing else []
    print_plan(plan, jobs, missing)
    if plan_only:
        return Outcome(plan.rows(), 0)
    if missing:
        check_writable(sweep.config.shards)  # better now than after the first trial
        check_writable(sweep.config.root)
    failed = _run(plan, jobs, fresh, address) if missing else []
    return _conclude(plan, failed, " ".join([str(spec), *overrides]) + " --quick" * quick)


def _conclude(plan: Plan, failed: list[str], command: str) -> Outcome:
    """Rebuilds results and report from the records that belong to the plan, and says how it went."""
    rows, root = plan.rows(), plan.sweep.config.root
    write_atomic(join(root, "results.jsonl"), "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    unfinished = plan.missing()
    if rows:
        report = write_report(rows, root, plan.sweep.config.report, list(plan.sweep.axes), command, unfinished)
        say(f"\n{report.table}\n\nreport: {report.path}")
    for reason in failed:
        say(f"failed: {reason}")
    if failed:
        say(f"{unfinished} trials are not done; running again tries them again")
        return Outcome(rows, 1)
    if unfinished:
        say(f"interrupted with {unfinished} trials to go; running again goes on from here")
    return Outcome(rows, 130 if unfinished else 0)


def _run(plan: Plan, jobs: list[Job], fresh: bool, address: str | None) -> list[str]:
    """Stages shards and runs what is missing; returns why trials failed, a line each."""
    with ray_cluster(plan.sweep.config.resources, address) as slots:
        stage(plan, jobs, slots)
        if fresh:  # only now: whatever went wrong before has cost no record
            plan.forget()
        return _tune(plan, plan.missing(), slots)


def _tune(plan: Plan, missing: int, slots: int) -> list[str]:
    from ray import tune

    from patchrank.tune.callback import Progress
    from patchrank.tune.search import CellSearch
    from patchrank.tune.worker import run_one

    config = plan.sweep.config
    how = {"base": config.trial.model_dump(), "root": config.root, "shards": config.shards, "sweep": config.name}
    trainable = tune.with_parameters(run_one, **how, **config.resources.model_dump())
    progress = Progress(missing)
    storage, run = _storage(config.root), time.strftime("run-%Y%m%d-%H%M%S")
    tuner = tune.Tuner(
        tune.with_resources(trainable, config.resources.model_dump()),
        tune_config=tune.TuneConfig(
            search_alg=CellSearch(plan), num_samples=missing, max_concurrent_trials=slots, reuse_actors=True
        ),
        run_config=tune.RunConfig(name=run, verbose=0, callbacks=[progress], **storage),
    )
    tuner.fit()
    progress.bar.close()
    if "storage_filesystem" not in storage:
        shutil.rmtree(join(storage["storage_path"], run), ignore_errors=True)
        with suppress(OSError):  # a killed driver's run may still lie there
            os.rmdir(storage["storage_path"])
    return progress.failures


def _storage(root: str) -> dict:
    """Where Ray keeps its own notes: beside the records, which are what counts."""
    if "://" not in root:
        return {"storage_path": join(root, "ray")}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = fsspec.core.url_to_fs(root)
    return {"storage_path": join(path, "ray"), "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}
