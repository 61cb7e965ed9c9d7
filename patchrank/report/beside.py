"""Finished rows of other sweeps that a report shows beside its own, and by what settings of several sweeps differ."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchrank.config import TrialConfig, leaves, validate
from patchrank.io import join, read_bytes
from patchrank.report.markdown import plural
from patchrank.report.results import FITTED, Arrays, Setting, configuration, drawn_by, ids_of, read_arrays


@dataclass(frozen=True)
class Beside:
    """Finished rows of another sweep with their arrays, and a sentence that says what there is."""

    rows: list[tuple[dict, Arrays]]
    note: str


class _LeftOut(Exception):
    """Why a row is not shown."""


class _Damaged(_LeftOut):
    """Why a row is not shown until its sweep runs again."""


def read_beside(roots: Sequence[str], own: Sequence[dict], own_root: str) -> list[Beside]:
    """The rows of other sweeps that are of the same model and data, without those that are among one's own.

    Rows that cannot be shown cost no report. The note counts them and says why, and which command helps.

    Args:
        own: the sweep's own rows, whose arrays lie in `<own_root>/trials`.
    """
    shown, found = {row["id"] for row in own}, []
    first = {_images_of(row["config"]): row for row in reversed(own)}
    images = {key: read_arrays(own_root, row) for key, row in first.items()}
    for root in roots:
        found.append(_read_sweep(root, own, images, shown))
        shown |= {row["id"] for row, _ in found[-1].rows}
    return found


def _read_sweep(root: str, own: Sequence[dict], images: dict[str, Arrays], shown: set[str]) -> Beside:
    name = root.removeprefix(f"{os.getcwd()}/")  # a report may be read elsewhere, where our folder says nothing
    try:
        lines = read_bytes(join(root, "results.jsonl")).decode().splitlines()
    except (OSError, ValueError) as error:
        why = f"its results.jsonl cannot be read ({' '.join(str(error).split())})"
        if isinstance(error, FileNotFoundError):
            why = "it holds no results.jsonl"
        return Beside([], f"Nothing of `{name}` is shown beside, since {why}: {_remedy(name)}.")
    rows, reasons = [], []
    for line in lines:
        try:
            row = _read_row(line)
            if row["id"] not in shown:
                _check_model_and_data(row["config"], own)
                rows.append((row, _read_arrays(root, row, images)))
        except _LeftOut as reason:
            reasons.append(reason)
    return Beside(rows, _note(name, len(rows), len(lines), reasons))


def _remedy(root: str) -> str:
    """What to run, going by the name of a sweep's folder."""
    name = root.rstrip("/").rpartition("/")[2]
    quick = " --quick" if name.endswith("-quick") else ""
    command = f"python -m patchrank.tune sweeps/{name.removesuffix('-quick')}.yaml{quick}"
    return f"run the sweep whose root it is (going by its name, `{command}`)"


def _note(root: str, count: int, total: int, reasons: Sequence[_LeftOut]) -> str:
    """How many rows are shown, how many are not, and why."""
    if not count and not reasons:
        return f"All trials of `{root}` are shown already." if total else f"`{root}` has no finished trial to show."
    text = f"Nothing of `{root}` is shown beside."
    if count:
        text = f"Beside them {'stands' if count == 1 else 'stand'} {plural(count, 'trial')} of `{root}`."
    if reasons:
        counts = [f"{times} {why}" for why, times in Counter(map(str, reasons)).items()]
        text += f" Left out of its {total}: {'; '.join(counts)}."
    if any(isinstance(each, _Damaged) for each in reasons):
        text += f" To mend what is damaged or old, {_remedy(root)}."
    return text


def _read_row(line: str) -> dict:
    """A row with its whole configuration and all figures that a table shows. Raises `_Damaged`."""
    try:
        row = json.loads(line)
        config = validate(TrialConfig, row["config"], str(row["id"])).model_dump(mode="json")
        prefix = "val_" if config["data"]["n_test"] == 0 else ""
        needed = ["gmacs", "gmacs_unpruned", f"{prefix}cosine", f"{prefix}agreement"]
        needed += ["n_train"] if config["pruning"]["reducer"] in FITTED else []
        if lacking := [key for key in needed if not isinstance(row["metrics"].get(key), int | float)]:
            raise _Damaged(f"whose record lacks {lacking[0]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged("whose record cannot be read") from error
    return row | {"id": str(row["id"]), "config": config}


def _read_arrays(root: str, row: dict, images: dict[str, Arrays]) -> Arrays:
    """A row's arrays. Raises `_LeftOut` where they are damaged, or of other images than those that are shown."""
    try:
        arrays = read_arrays(root, row)
        _check_arrays(arrays, row["config"], images.get(_images_of(row["config"]), arrays))
    except _LeftOut:
        raise
    except Exception as error:  # damaged files make zipfile, zlib and NumPy stumble over anything
        raise _Damaged("whose arrays are missing or damaged") from error
    return arrays


def _check_arrays(arrays: Arrays, config: dict, ours: Arrays) -> None:
    """Raises `_LeftOut` for arrays that lack something, or are of other images than our own."""
    on_val = config["data"]["n_test"] == 0
    for task in config["data"]["tasks"]:
        prefix, ids = (f"{task}.val_" if on_val else f"{task}."), ids_of(task, on_val)
        needed = [ids, f"{task}.val_ids", "grid", f"{task}.pictures", f"{task}.pictures_kept"]
        of_images = [prefix + name for name in ("right_pruned", "right_unpruned", "cosine")]
        if lacking := [name for name in (*needed, *of_images) if name not in arrays]:
            raise _Damaged(f"whose arrays lack {lacking[0]}")
        if any(len(arrays[name]) != len(arrays[ids]) for name in of_images):
            raise _Damaged("whose arrays differ in length")
        if not np.array_equal(arrays[ids], ours[ids]):
            raise _LeftOut("of other images")
        if not np.array_equal(drawn_by(arrays, task, on_val)[0], drawn_by(ours, task, on_val)[0]):
            raise _Damaged("of an earlier version, which draws images otherwise")


def _check_model_and_data(config: dict, own: Sequence[dict]) -> None:
    """Raises `_LeftOut` unless model and data are those of one of the sweep's own rows."""
    if config["data"]["n_test"] == 0 and all(row["config"]["data"]["n_test"] != 0 for row in own):
        raise _LeftOut("without figures of test images, which are shown here")
    theirs = leaves({key: config[key] for key in ("model", "data")})
    differing = []
    for row in own:
        ours = leaves({key: row["config"][key] for key in ("model", "data")})
        differing.append([key for key, value in theirs.items() if ours.get(key) != value])
    if fewest := min(differing, key=len):
        raise _LeftOut(f"of another model or other data ({', '.join(fewest)})")


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
