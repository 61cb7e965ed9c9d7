"""What a sweep found, for TensorBoard and optuna-dashboard: rebuilt from records, never read back.

    <root>/tensorboard/<trial>/events.out.tfevents.<what it holds>    one run a trial, its swept settings as hparams
    <root>/optuna.log                                                 one study a grid cell

Both are made in a local folder first. A file that already holds what it should is left alone, so that a run which
finds nothing to do costs a listing.
"""

from __future__ import annotations

import datetime
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patchrank.config import Constraint, Objective, Rule, leaves, value_at
from patchrank.io import content_id, exists, filesystem_of, join, read_bytes, remove, write_atomic

if TYPE_CHECKING:
    import optuna

VERSION = 1  # of both: bump it when the same records would give other files
WRITERS = 16  # files written at a time; object stores answer slowly, but many at once
LONGEST = 120  # characters of a name


@dataclass(frozen=True)
class Study:
    """One study to export: its name, and of each trial the values that its axes took and its record.

    Records have the status `ok`, `stopped` or `error`; the latter say why in `error`.
    """

    name: str
    trials: Sequence[tuple[Mapping[str, object], dict]]


def export_tensorboard(rows: Sequence[dict], root: str, axes: Sequence[str]) -> str:
    """Writes an event file for each finished trial and removes those of others; returns their folder.

    Args:
        rows: finished records, as in `results.jsonl`.
        root: folder or URL of the sweep.
        axes: dotted paths of the settings that are swept.
    """
    folder = join(root, "tensorboard")
    wanted = {_event_path(row, axes): row for row in rows}
    there = set(_files_below(folder))
    new = [path for path in wanted if path not in there]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(WRITERS) as pool:
        events = [_write_events(Path(temporary) / f"{n}", wanted[path], axes) for n, path in enumerate(new)]
        list(pool.map(lambda path, file: write_atomic(join(folder, path), file.read_bytes()), new, events))
        list(pool.map(lambda path: remove(join(folder, path)), sorted(there - wanted.keys())))
    return folder


def export_optuna(
    studies: Sequence[Study],
    rules: Mapping[str, Rule],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    root: str,
) -> str:
    """Writes a journal that `optuna.load_study` and `optuna-dashboard` read; returns its path.

    Args:
        studies: one for each cell of the grid, under names that need not differ.
        rules: of all axes that the studies' trials have values for; those of a grid are choices.
        objectives, constraints: as the sweep file has them; a trial that lacks one of their figures failed.
    """
    path = join(root, "optuna.log")
    settings = [rule.model_dump(by_alias=True) for rule in rules.values()]
    settings += [each.model_dump() for each in (*objectives, *constraints)]
    trials = [[study.name, [[dict(drawn), record] for drawn, record in study.trials]] for study in studies]
    key = content_id([VERSION, list(rules), settings, trials])
    if exists(path) and key.encode() in read_bytes(path):
        return path
    with tempfile.TemporaryDirectory() as temporary:
        journal = Path(temporary) / "optuna.log"
        _write_studies(journal, key, studies, rules, objectives, constraints)
        write_atomic(path, journal.read_bytes())
    return path


def _event_path(row: dict, axes: Sequence[str]) -> str:
    """`seed=0,locations=4-6-8-10.1a2b3c4d/events...`, which names all that the file holds."""
    values = [(axis.rsplit(".", 1)[-1], value_at(row["config"], axis)) for axis in axes]
    shown = ",".join(f"{key}={_short(value)}" for key, value in values if value is not None) or "trial"
    held = content_id([VERSION, _hparams(row, axes), row["metrics"], row["date"]])
    return f"{shown[:LONGEST]}.{row['id'][:8]}/events.out.tfevents.{held[:12]}"


def _short(value: object) -> str:
    """A value without what paths, URLs and globs give a meaning to."""
    if isinstance(value, dict):
        return "-".join(f"{key}={_short(inner)}" for key, inner in value.items())
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)


def _files_below(folder: str) -> Iterator[str]:
    """Paths of all files in a folder, from it."""
    filesystem, name = filesystem_of(folder)
    filesystem.invalidate_cache(name)
    for found in filesystem.find(name):
        yield str(found)[len(name.rstrip("/")) + 1 :]


def _hparams(row: dict, axes: Sequence[str]) -> dict[str, object]:
    """Swept settings by dotted path; lists as text, which is how TensorBoard can show them."""
    values = leaves({axis: value_at(row["config"], axis) for axis in axes})
    return {key: f"{value}" if isinstance(value, list) else value for key, value in values.items()}


def _write_events(path: Path, row: dict, axes: Sequence[str]) -> Path:
    """One event file: hparams and, at step 0, every metric; figures of a task below its name."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import hparams, scalar

    metrics = {key: value for key, value in row["metrics"].items() if key != "tasks"} | row["metrics"].get("tasks", {})
    figures = {key.replace(".", "/"): value for key, value in leaves(metrics).items()}
    _, start, end = hparams(_hparams(row, axes), {})  # without the first, TensorBoard gathers settings from all runs
    summaries = [start, end, *(scalar(key, value) for key, value in figures.items() if _is_number(value))]
    when, writer = _when(row).timestamp(), RecordWriter(str(path))
    writer.write(Event(wall_time=when, file_version="brain.Event:2").SerializeToString())
    for summary in summaries:
        writer.write(Event(wall_time=when, step=0, summary=summary).SerializeToString())
    writer.close()
    return path


def _write_studies(
    path: Path,
    key: str,
    studies: Sequence[Study],
    rules: Mapping[str, Rule],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    directions = ["maximize" if objective.mode == "max" else "minimize" for objective in objectives]
    for name, study in zip(_distinct([study.name for study in studies]), studies):
        made = optuna.create_study(storage=storage, study_name=name, directions=directions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made.set_metric_names([objective.metric for objective in objectives])
        made.set_user_attr("patchrank", key)
        made.add_trials([_frozen(drawn, record, rules, objectives, constraints) for drawn, record in study.trials])


def _frozen(
    drawn: Mapping[str, object],
    record: dict,
    rules: Mapping[str, Rule],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
) -> optuna.trial.FrozenTrial:
    """A record as Optuna has it: with values, or with the reason why there are none."""
    import optuna

    from patchrank.tune.space import distribution, encode

    choices = {key: Rule(choice=rule.grid) if rule.grid else rule for key, rule in rules.items()}
    metrics, cause = record.get("metrics", {}), _cause(record, objectives, constraints)
    about = {key: value for key, value in metrics.items() if _is_number(value)}
    is_ok = cause is None
    state = "COMPLETE" if is_ok else "PRUNED" if record["status"] == "stopped" else "FAIL"
    trial = optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        values=[metrics[objective.metric] for objective in objectives] if is_ok else None,
        params={key: encode(choices[key], value) for key, value in drawn.items()},
        distributions={key: distribution(choices[key]) for key in drawn},
        user_attrs={"id": record["id"]} | about | ({} if is_ok else {"cause": cause}),
        constraints={_bound(each): float(each.excess(metrics)) for each in constraints} if is_ok else None,
    )
    trial.datetime_start = trial.datetime_complete = _when(record)
    return trial


def _cause(record: dict, objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> str | None:
    """Why a trial has no values; None where it has all that are asked for."""
    if record["status"] == "stopped":
        return "ended early, since it fell behind others"
    if record["status"] != "ok":
        return record.get("error", "unknown")
    metrics = {each.metric: record["metrics"].get(each.metric) for each in (*objectives, *constraints)}
    lacking = [name for name, value in metrics.items() if not _is_number(value)]
    return f"{', '.join(lacking)} could not be measured" if lacking else None


def _bound(constraint: Constraint) -> str:
    """`gmacs at most 0.03`."""
    if constraint.at_most is not None:
        return f"{constraint.metric} at most {constraint.at_most:g}"
    return f"{constraint.metric} at least {constraint.at_least:g}"


def _distinct(names: Sequence[str]) -> Iterator[str]:
    """Names, with a number where one is there already."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _when(record: dict) -> datetime.datetime:
    """The day of a record, which is all that it says of time; the first of all days where it says nothing."""
    return datetime.datetime.fromisoformat(record.get("date", "1970-01-02"))
