"""Rows of other sweeps that a report shows beside its own: which there are, and by what else they are told apart."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchrank.config import TrialConfig, leaves, validate
from patchrank.data.digits.scenes import STYLES
from patchrank.io import join, read_bytes
from patchrank.report.results import FITTED, Arrays, Setting, configuration, read_arrays
from patchrank.utils.errors import UserError

METRICS = ("cosine", "agreement")  # that every shown row has, of validation images under val_
COSTS = ("gmacs", "gmacs_unpruned")
PER_IMAGE = ("ids", "right_pruned", "right_unpruned", "cosine")  # likewise, of every task
PICTURES = ("pictures", "pictures_kept", "val_ids")


@dataclass(frozen=True)
class Beside:
    """Finished rows of another sweep with their arrays, and a sentence that says what there is."""

    rows: list[tuple[dict, Arrays]]
    note: str


class _LeftOut(Exception):
    """Why a row is not shown; `mends`: whether running its sweep again helps."""

    def __init__(self, why: str, mends: bool = False):
        super().__init__(why)
        self.mends = mends


def read_beside(roots: Sequence[str], own: Sequence[dict], own_root: str) -> list[Beside]:
    """The rows of other sweeps that are of the same model and data, without those that are among one's own.

    What cannot be shown costs no report: the sentence counts it and says why, and which command helps.

    Args:
        own: the sweep's own rows, whose arrays lie in `<own_root>/trials`.
    """
    shown, found = {row["id"] for row in own}, []
    first = {_images_of(row["config"]): row for row in reversed(own)}
    ids = {key: read_arrays(own_root, row) for key, row in first.items()}
    for root in roots:
        found.append(_read(root, _named(root), [row["config"] for row in own], ids, shown))
        shown |= {row["id"] for row, _ in found[-1].rows}
    return found


def _named(root: str) -> str:
    """A root as a report calls it: relative to the working folder if it lies below, since reports are passed on."""
    return root.removeprefix(f"{os.getcwd()}/")


def _read(root: str, name: str, own: Sequence[dict], images: dict[str, Arrays], shown: set[str]) -> Beside:
    try:
        lines = read_bytes(join(root, "results.jsonl")).decode().splitlines()
    except FileNotFoundError:
        return Beside([], f"Nothing of `{name}` is shown beside, since it holds no results.jsonl: {_remedy(name)}.")
    except (OSError, ValueError, UserError) as error:
        cause = " ".join(str(error).split())
        said = f"Nothing of `{name}` is shown beside, since its results.jsonl cannot be read ({cause})"
        return Beside([], f"{said}: {_remedy(name)}.")
    rows, reasons = [], []
    for line in lines:
        try:
            row = _row(line)
            if row["id"] not in shown:
                rows.append((row, _arrays(root, row, own, images)))
        except _LeftOut as reason:
            reasons.append(reason)
    return Beside(rows, _note(name, len(rows), len(lines), reasons))


def _note(root: str, count: int, total: int, reasons: Sequence[_LeftOut]) -> str:
    """How many rows are shown, how many of them are not, and why."""
    stand = f"stands 1 trial of `{root}`" if count == 1 else f"stand {count} trials of `{root}`"
    text = f"Beside them {stand}." if count else f"Nothing of `{root}` is shown beside."
    if not count and not reasons:
        return f"All trials of `{root}` are shown already." if total else f"`{root}` has no finished trial to show."
    whys = list(dict.fromkeys(map(str, reasons)))
    counts = [f"{sum(str(each) == why for each in reasons)} {why}" for why in whys]
    text += f" Left out of its {total}: {'; '.join(counts)}." if counts else ""
    mends = any(each.mends for each in reasons)
    return f"{text} To mend what is damaged or old, {_remedy(root)}." if mends else text


def _remedy(root: str) -> str:
    name = root.rstrip("/").rpartition("/")[2].removesuffix("-quick")
    quick = " --quick" if root.rstrip("/").endswith("-quick") else ""
    return f"run the sweep whose root it is (going by its name, `python -m patchrank.tune sweeps/{name}.yaml{quick}`)"


def _row(line: str) -> dict:
    """Raises `_LeftOut` for what is no whole record."""
    try:
        row = json.loads(line)
        config = validate(TrialConfig, row["config"], str(row["id"])).model_dump()
        on = "val_" if config["data"]["n_test"] == 0 else ""
        fitted = ["n_train"] if config["pruning"]["reducer"] in FITTED else []
        needed = [*COSTS, *(on + key for key in METRICS), *fitted]
        lacking = [key for key in needed if not isinstance(row["metrics"].get(key), int | float)]
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise _LeftOut("whose record cannot be read", mends=True) from error
    if lacking:
        raise _LeftOut(f"whose record lacks {lacking[0]}", mends=True)
    return row | {"id": str(row["id"]), "config": config}


def _arrays(root: str, row: dict, own: Sequence[dict], images: dict[str, Arrays]) -> Arrays:
    """Raises `_LeftOut` for a row of another model or other data, and for arrays that cannot be shown."""
    _compare(row["config"], own)
    try:
        arrays = read_arrays(root, row)
        _check(arrays, row["config"], images.get(_images_of(row["config"]), arrays))
    except _LeftOut:
        raise
    except Exception as error:  # damaged files make zipfile, zlib and NumPy stumble over anything
        raise _LeftOut("whose arrays are missing or damaged", mends=True) from error
    return arrays


def _check(arrays: Arrays, config: dict, ours: Arrays) -> None:
    """Raises `_LeftOut` for arrays that lack something, or are of other images than those that are shown."""
    tasks, on = config["data"]["tasks"], "val_" if config["data"]["n_test"] == 0 else ""
    names = [f"{task}.{name}" for task in tasks for name in (*(on + each for each in PER_IMAGE), *PICTURES)]
    if lacking := [name for name in ("grid", *names) if name not in arrays]:
        raise _LeftOut(f"whose arrays lack {lacking[0]}", mends=True)
    if any(len(arrays[f"{task}.{on}{name}"]) != len(arrays[f"{task}.{on}ids"]) for task in tasks for name in PER_IMAGE):
        raise _LeftOut("whose arrays differ in length", mends=True)
    if not set(tasks) <= set(STYLES) and not any(name.endswith("groups") for name in arrays):
        raise _LeftOut("of an earlier version, which does not tell what images are drawn by", mends=True)
    if any(not np.array_equal(arrays[f"{task}.{on}ids"], ours[f"{task}.{on}ids"]) for task in tasks):
        raise _LeftOut("of other images")


def _compare(config: dict, own: Sequence[dict]) -> None:
    """Raises `_LeftOut` unless model and data are those of one of the sweep's own rows."""
    if config["data"]["n_test"] == 0 and all(each["data"]["n_test"] != 0 for each in own):
        raise _LeftOut("without figures of test images, which are shown here")
    theirs = _model_and_data(config)
    differing = [[key for key, value in theirs.items() if ours.get(key) != value] for ours in map(_model_and_data, own)]
    if fewest := min(differing, key=len):
        raise _LeftOut(f"of another model or other data ({', '.join(fewest)})")


def _model_and_data(config: dict) -> dict:
    return leaves({"model": config["model"], "data": config["data"]})


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
