"""Rows of other sweeps that a report shows beside its own: which there are, and by what else they are told apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from patchrank.config import TrialConfig, validate
from patchrank.data.digits import STYLES
from patchrank.errors import UserError
from patchrank.files import join, list_names, read_bytes
from patchrank.report.results import Setting, configuration, has_groups


@dataclass(frozen=True)
class Beside:
    """Finished rows of another sweep, the root that their arrays lie in, and a sentence that says what there is."""

    root: str
    rows: list[dict]
    note: str


def read_beside(roots: Sequence[str], own: Sequence[dict]) -> list[Beside]:
    """The rows of other sweeps, without those that are among one's own.

    What cannot be shown costs no report: the sentence says why, and which command helps.
    """
    ids, found = {row["id"] for row in own}, []
    for root in roots:
        rows, note = _read(root)
        rows = [row for row in rows if row["id"] not in ids]
        ids |= {row["id"] for row in rows}
        found.append(Beside(root, rows, note or f"Beside them stand {len(rows)} trials of `{root}`."))
    return found


def _read(root: str) -> tuple[list[dict], str]:
    """Rows, and why some or all are left out."""
    name = root.rstrip("/").rpartition("/")[2].removesuffix("-quick")
    quick = " --quick" if root.rstrip("/").endswith("-quick") else ""
    remedy = f"run the sweep whose root it is (going by its name, `python -m patchrank.tune sweeps/{name}.yaml{quick}`)"
    try:
        rows = [json.loads(line) for line in read_bytes(join(root, "results.jsonl")).decode().splitlines()]
        configs = [validate(TrialConfig, row["config"], row["id"]) for row in rows]
    except FileNotFoundError:
        return [], f"Nothing of `{root}` is shown beside, since it holds no results.jsonl: {remedy}."
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        cause = " ".join(str(error).split())
        return [], f"Nothing of `{root}` is shown beside, since its results.jsonl cannot be used ({cause}): {remedy}."
    rows = [row | {"config": config.model_dump()} for row, config in zip(rows, configs)]
    names = set(list_names(join(root, "trials")))
    usable = [row for row in rows if f"{row['id']}.npz" in names and _tells_groups(root, row)]
    if len(usable) == len(rows):
        return usable, ""
    shown = f"Beside them stand {len(usable)} of {len(rows)} trials of `{root}`"
    return usable, f"{shown}; the others have no arrays, or some of an earlier version: {remedy}."


def _tells_groups(root: str, row: dict) -> bool:
    """Whether it is known what a row's images are drawn by: no trial id vouches here that its data has no groups."""
    return set(row["config"]["data"]["tasks"]) <= set(STYLES) or has_groups(root, row)


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
