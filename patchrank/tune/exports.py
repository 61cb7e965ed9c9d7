"""What a sweep found, for TensorBoard and optuna-dashboard: rebuilt from records, never read back.

    <root>/tensorboard/<trial>/events.out.tfevents.<content id>    one run a trial, its swept settings as hparams
    <root>/optuna.log                                              one study a grid cell

Both are made in a local folder first. Names and contents tell whether a file is up to date, and such a file is left
alone, so that a run which finds nothing to do costs a listing.
"""

from __future__ import annotations

import datetime
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from patchrank.config import Rule, SweepConfig, leaves, value_at
from patchrank.io import content_id, exists, filesystem_of, join, read_bytes, remove, write_atomic
from patchrank.report.pareto import is_number
from patchrank.tune.console import describe
from patchrank.tune.plan import Plan
from patchrank.tune.space import create_study, directions, past_trial

VERSION = 2  # of both: bump it when the same records would give other files
WRITERS = 16  # files written at a time; object stores answer slowly, but many at once
LONGEST = 120  # characters of a name


class Study(NamedTuple):
    """One study to export: its name, and of each trial the values that its axes took and its record.

    Records have the status `ok`, `stopped` or `error`; the latter say why in `error`. rules: of its axes, in place of
    those of all studies.
    """

    name: str
    trials: Sequence[tuple[Mapping[str, object], dict]]
    rules: Mapping[str, Rule] = MappingProxyType({})


def export(plan: Plan, rows: Sequence[dict]) -> None:
    """Writes both below the sweep's root. Raises `UserError` where nothing can be written there."""
    config, failed = plan.sweep.config, plan.failures()
    export_tensorboard(rows, config.root, list(plan.sweep.axes))
    if not plan.sampled:  # a single study where every trial is a point of a plan
        done = [(cell.values, record) for cell in plan.cells for record, _ in plan.records_of(cell)]
        export_optuna([Study(config.name, done + failed)], plan.sweep.axes, config)
        return
    studies = []
    for cell in plan.cells:  # otherwise one for each cell that is searched around
        trials = [(drawn, record) for record, drawn in plan.records_of(cell)]
        own = [(values, record) for values, record in failed if cell.holds(values)]
        trials += [({key: values[key] for key in plan.sampled if key in values}, record) for values, record in own]
        studies.append(Study(describe(cell.values), trials, cell.sampled))
    export_optuna(studies, plan.sampled, config)


def export_tensorboard(rows: Sequence[dict], root: str, axes: Sequence[str]) -> str:
    """Writes an event file for each finished trial and removes those of others; returns their folder.

    Args:
        rows: finished records, as in `results.jsonl`.
        root: folder or URL of the sweep.
        axes: dotted paths of the settings that are swept.
    """
    folder = join(root, "tensorboard")
    wanted = {}
    for row in rows:  # `seed=0,locations=4-6-8-10.1a2b3c4d/events.out.tfevents.<id of all that the file holds>`
        values = [(axis.rsplit(".", 1)[-1], value_at(row["config"], axis)) for axis in axes]
        shown = ",".join(f"{key}={_short(value)}" for key, value in values if value is not None) or "trial"
        held = content_id([VERSION, _hparams(row, axes), row["metrics"], row["date"]])
        wanted[f"{shown[:LONGEST]}.{row['id'][:8]}/events.out.tfevents.{held[:12]}"] = row
    filesystem, name = filesystem_of(folder)
    filesystem.invalidate_cache(name)
    there = {str(found)[len(name.rstrip("/")) + 1 :] for found in filesystem.find(name)}
    new = [path for path in wanted if path not in there]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(WRITERS) as pool:
        events = [_write_events(Path(temporary) / f"{n}", wanted[path], axes) for n, path in enumerate(new)]
        list(pool.map(lambda path, file: write_atomic(join(folder, path), file.read_bytes()), new, events))
        list(pool.map(lambda path: remove(join(folder, path)), sorted(there - wanted.keys())))
    return folder


def _short(value: object) -> str:
    """A value without the characters that have a meaning in paths, URLs and globs."""
    if isinstance(value, dict):
        return "-".join(f"{key}={_short(inner)}" for key, inner in value.items())
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)


def _hparams(row: dict, axes: Sequence[str]) -> dict[str, object]:
    """Swept settings by dotted path; lists as text, which is how TensorBoard can show them."""
    values = leaves({axis: value_at(row["config"], axis) for axis in axes})
    return {key: f"{value}" if isinstance(value, list) else value for key, value in values.items()}


def _write_events(folder: Path, row: dict, axes: Sequence[str]) -> Path:
    """One event file: hparams and, at step 0, every metric; figures of a task below its name."""
    from tensorboardX import SummaryWriter
    from tensorboardX.summary import hparams

    metrics = {key: value for key, value in row["metrics"].items() if key != "tasks"} | row["metrics"].get("tasks", {})
    when = datetime.datetime.fromisoformat(row["date"]).timestamp()
    _, start, end = hparams(_hparams(row, axes), {})  # without the first, TensorBoard gathers settings from all runs
    with SummaryWriter(str(folder)) as writer:
        for summary in (start, end):
            writer.file_writer.add_summary(summary, walltime=when)
        for key, value in leaves(metrics).items():
            if is_number(value):
                writer.add_scalar(key.replace(".", "/"), value, 0, walltime=when)
    (file,) = folder.iterdir()
    return file


def export_optuna(studies: Sequence[Study], rules: Mapping[str, Rule], config: SweepConfig) -> str:
    """Writes a journal that `optuna.load_study` and `optuna-dashboard` read; returns its path.

    Args:
        studies: one for each cell of the grid, under names that need not differ.
        rules: of all axes that the studies' trials have values for; those of a grid are choices.
        config: the sweep's; a trial that lacks a figure of one of its objectives or constraints failed.
    """
    path, objectives = join(config.root, "optuna.log"), config.objectives
    settings = [rule.model_dump(by_alias=True) for rule in rules.values()]
    settings += [each.model_dump() for each in (*objectives, *config.constraints)]
    trials = [[study.name, [[dict(drawn), record] for drawn, record in study.trials]] for study in studies]
    key = content_id([VERSION, list(rules), settings, trials])
    if exists(path) and key.encode() in read_bytes(path):
        return path
    choices = {axis: Rule(choice=rule.grid) if rule.grid else rule for axis, rule in rules.items()}
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        journal = Path(temporary) / "optuna.log"
        storage = JournalStorage(JournalFileBackend(str(journal)))
        for study in studies:
            seen[study.name] += 1
            name = study.name if seen[study.name] == 1 else f"{study.name} ({seen[study.name]})"
            made = create_study(storage=storage, study_name=name, directions=directions(objectives))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                made.set_metric_names([objective.metric for objective in objectives])
            made.set_user_attr("patchrank", key)
            past = [past_trial(record, drawn, {**choices, **study.rules}, config) for drawn, record in study.trials]
            made.add_trials(past)
        write_atomic(path, journal.read_bytes())
    return path
