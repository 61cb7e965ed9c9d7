"""Finished rows of other sweeps that a report shows beside its own, and by what settings of several sweeps differ."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from patchrank.config import TrialConfig, leaves, validate
from patchrank.io import join, read_bytes
from patchrank.report.markdown import plural
from patchrank.report.pareto import is_number
from patchrank.report.results import FITTED, Setting, Trial, configuration, drawn_by, prefix_of, read_trial

DAMAGED = "whose record or arrays are missing or damaged"
OLD = "of an earlier version, which draws images otherwise"


class _LeftOut(Exception):
    """Why a row is not shown."""


def read_beside(roots: Sequence[str], own: Sequence[Trial]) -> tuple[list[Trial], list[str]]:
    """The trials of other sweeps that are of the same model and data, without those that are among one's own.

    Rows that cannot be shown cost no report. A note of each sweep counts them and says why, and which command helps.
    """
    shown, notes = [], []
    for root in roots:
        found, note = _read_sweep(root, own, {row["id"] for row, _ in [*own, *shown]})
        shown += found
        notes.append(note)
    return shown, notes


def _read_sweep(root: str, own: Sequence[Trial], known: set[str]) -> tuple[list[Trial], str]:
    """What of a sweep is shown, its `known` rows aside, and the note."""
    name = root.removeprefix(f"{os.getcwd()}/")  # a report may be read elsewhere, where our folder says nothing
    try:
        lines = read_bytes(join(root, "results.jsonl")).decode().splitlines()
    except (OSError, ValueError) as error:
        why = f"since its results.jsonl cannot be read ({' '.join(str(error).split())})"
        return [], f"Nothing of `{name}` is shown beside, {why}: {_remedy(name)}."
    shown, reasons = [], []
    for line in lines:
        try:
            shown += _read_trial(root, line, own, known)
        except _LeftOut as reason:
            reasons.append(str(reason))
        except Exception:  # damaged files make JSON, zipfile, zlib and NumPy stumble over anything
            reasons.append(DAMAGED)
    if not shown and not reasons:
        return [], f"All trials of `{name}` are shown already." if lines else f"`{name}` has no finished trial to show."
    note = f"Nothing of `{name}` is shown beside."
    if shown:
        note = f"Beside them {'stands' if len(shown) == 1 else 'stand'} {plural(len(shown), 'trial')} of `{name}`."
    if reasons:
        counts = [f"{times} {why}" for why, times in Counter(reasons).items()]
        note += f" Left out of its {len(lines)}: {'; '.join(counts)}."
    if {DAMAGED, OLD} & set(reasons):
        note += f" To mend what is damaged or old, {_remedy(name)}."
    return shown, note


def _remedy(root: str) -> str:
    """What to run, going by the name of a sweep's folder."""
    name = root.rstrip("/").rpartition("/")[2]
    quick = " --quick" if name.endswith("-quick") else ""
    command = f"python -m patchrank.tune sweeps/{name.removesuffix('-quick')}.yaml{quick}"
    return f"run the sweep whose root it is (going by its name, `{command}`)"


def _read_trial(root: str, line: str, own: Sequence[Trial], known: set[str]) -> list[Trial]:
    """A row with its whole configuration, and its arrays; nothing where it is `known`.

    Raises:
        _LeftOut: it lacks what a page shows, or is of another model or other images.
        Exception: any, of a damaged file.
    """
    row = json.loads(line)
    row["config"] = validate(TrialConfig, row["config"], str(row["id"])).model_dump(mode="json")
    row["id"] = str(row["id"])
    if row["id"] in known:
        return []
    theirs, differing = leaves({key: row["config"][key] for key in ("model", "data")}), []
    for ours in (leaves(each["config"]) for each, _ in own):
        differing.append([key for key, value in theirs.items() if ours.get(key) != value])
    if fewest := min(differing, key=len):
        raise _LeftOut(f"of another model or other data ({', '.join(fewest)})")
    trial = read_trial(root, row)
    _check_images(trial, own)
    return [trial]


def _check_images(trial: Trial, own: Sequence[Trial]) -> None:
    """Raises `_LeftOut` where something lacks that a page shows, or images are others than our own."""
    (row, arrays), config = trial, trial[0]["config"]
    ours = next((each for row, each in own if _images_of(row["config"]) == _images_of(config)), arrays)
    on_val = config["data"]["n_test"] == 0
    figures = ["gmacs", "gmacs_unpruned", *(f"val_{name}" if on_val else name for name in ("cosine", "agreement"))]
    figures = [key for key in figures if key in own[0][0]["metrics"] or not key.endswith("agreement")]
    figures += ["n_train"] if config["pruning"]["reducer"] in FITTED else []
    is_whole = all(is_number(row["metrics"].get(key)) for key in figures)
    for task in config["data"]["tasks"]:
        prefix = prefix_of(task, on_val)
        answers = ("right_pruned", "right_unpruned")  # which models without a text tower may not have
        names = ["ids", "cosine", *(name for name in answers if prefix + name in ours)]
        lengths = {len(arrays[prefix + name]) for name in names}
        shown = {"grid", f"{task}.val_ids", f"{task}.pictures", f"{task}.pictures_kept"}
        if not is_whole or len(lengths) > 1 or not shown <= arrays.keys():
            raise _LeftOut(DAMAGED)
        if not np.array_equal(arrays[f"{prefix}ids"], ours[f"{prefix}ids"]):
            raise _LeftOut("of other images")
        if not np.array_equal(drawn_by(arrays, task, on_val)[0], drawn_by(ours, task, on_val)[0]):
            raise _LeftOut(OLD)


def _images_of(config: dict) -> str:
    """What tells rows with the same images: model, data, and whether only an oracle's first images were looked at."""
    return json.dumps([config["model"], config["data"], config["pruning"]["reducer"] == "golden"], sort_keys=True)


def told_apart_by(settings: Sequence[Setting], axes: Sequence[str]) -> list[str]:
    """The swept axes, and all else that settings of several sweeps differ in."""
    found = [configuration(setting.config) for setting in settings]
    more = []
    for path in dict.fromkeys(path for each in found for path in each):
        values = [each[path] for each in found if path in each]
        is_swept = any(path == axis or path.startswith(f"{axis}.") for axis in axes)
        if not is_swept and any(value != values[0] for value in values):
            more.append(path)
    return [*axes, *more]
