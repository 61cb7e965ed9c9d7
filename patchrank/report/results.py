"""Result rows and the arrays beside them, put together: one `Setting` per point of a sweep, its seeds merged."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from patchrank.config import leaves
from patchrank.io import join, read_bytes
from patchrank.report.measures import ALL_MEASURES, CONTROLS, OF_RANKINGS, STAND_INS
from patchrank.utils.errors import StoreError, UserError, one_line
from patchrank.utils.stats import Interval, paired_interval

NEEDED = {"date": str, "sweep": str, "env": dict, "metrics": dict}  # keys of a row, and the kinds of their values
ENV = {"patchrank", "torch", "device", "threads"}  # what the report tells of where trials ran


# reducers whose ranking learned from golden scores of other images
FITTED = ("predictor", "prior", "guided_merge", "rank_merge")
OLD_SCENE = re.compile(r"digits\w*/\w+/(\d{4})-\d+")  # the id of an embedded scene, and in it the digit's number

Arrays = dict[str, np.ndarray]  # what a trial saved of its images, by name
Trial = tuple[dict, Arrays]  # a result row and what belongs to it


class Values(NamedTuple):
    """One number for each of n images, in the order of the images.

    values: (n,). ids: (n,), the images' names. clusters: (n,), equal for images that statistics draw together. units:
    (n,), the word for a cluster: "digit", "group", or "image" where each image stands for itself.
    """

    values: np.ndarray
    ids: np.ndarray
    clusters: np.ndarray
    units: np.ndarray


class _Metrics(dict[str, float]):
    """Metrics by name. One that is asked for and not there is missing in a record, since all trials write the same."""

    def __init__(self, found: dict[str, float], records: Sequence[str]):
        super().__init__(found)
        self.records = records

    def __missing__(self, key: str) -> float:
        cure = "try removing it, and its trial is run again"
        raise UserError(f"{' or '.join(self.records)}: lacks a sound {key!r} in metrics; {cure}")


def joined(parts: Iterable[Values]) -> Values:
    """The values of several tasks, one after the other."""
    return Values(*map(np.concatenate, zip(*parts)))


@dataclass(frozen=True, eq=False)  # compared and hashed as the object that it is
class Setting:
    """All rows of a sweep that differ in seed and controls alone, and the arrays of each.

    on_val: no trial looked at test (`data.n_test: 0`), so all that is shown is of validation images.
    """

    rows: list[dict]
    arrays: list[Arrays]
    on_val: bool = False

    @property
    def config(self) -> dict:
        return self.rows[0]["config"]

    @property
    def tasks(self) -> list[str]:
        return self.config["data"]["tasks"]

    @property
    def is_oracle(self) -> bool:
        """Whether it is ranked by golden scores of the images that it is evaluated on, which are a subset."""
        return self.config["pruning"]["reducer"] == "golden"

    @property
    def is_fitted(self) -> bool:
        """Whether its ranking was fitted to golden scores of other images."""
        return self.config["pruning"]["reducer"] in FITTED

    @property
    def merges(self) -> bool:
        """Whether tokens are compared with each other, and so may merge."""
        return self.metrics.get("gmacs_matching", 0) > 0

    @property
    def leftovers(self) -> str:
        """What becomes of tokens that its ranking does not keep; "" of a reducer that merges by a rule of its own."""
        said = self.config["pruning"]["leftovers"]
        return said or ("" if self.merges else "drop")

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The rows' metrics that are plain numbers, averaged over seeds."""
        found = {key: [row["metrics"].get(key) for row in self.rows] for key in self.rows[0]["metrics"]}
        shared = {key: each for key, each in found.items() if all(isinstance(value, int | float) for value in each)}
        names = [f"trials/{row['id']}.json" for row in self.rows]
        return _Metrics({key: float(np.mean(each)) for key, each in shared.items()}, names)

    @cached_property
    def worth(self) -> str:
        """What it is judged by, in words: a key of `STAND_INS`, `accuracy` where that is known."""
        prefix = "val_" if self.on_val else ""
        having = (word for word, each in STAND_INS.items() if self.has(prefix + each.get("accuracy", "accuracy")))
        return next(having, "accuracy")

    def shown(self, measure: str) -> str:
        """The measure itself, or its counterpart on validation images where no test image was looked at.

        Where the model gives no accuracy, the measure that stands for it.
        """
        measure = STAND_INS[self.worth].get(measure, measure)
        return f"val_{measure}" if self.on_val and f"val_{measure}" in ALL_MEASURES else measure

    def has(self, measure: str) -> bool:
        """Whether all seeds have a measure. For a control one is enough, since few seeds may run it."""
        having = len(self._having(measure))
        return having > 0 if measure.rpartition("_")[2] in CONTROLS else having == len(self.arrays)

    def unit(self, task: str) -> str:
        """The word for what a task's images are drawn by: digit, group, or image."""
        return drawn_by(self.arrays[0], task, self.on_val)[1]

    def seeds_with(self, measure: str) -> list[int]:
        """The seeds that have a measure."""
        return [self.rows[n]["config"]["seed"] for n in self._having(measure)]

    def values(self, measure: str, task: str | None = None, limit: int | None = None) -> Values:
        """One number an image, averaged over the seeds that have it, of one task or of all of them.

        Args:
            limit: only the first so many images of each task (the oracles' subset).
        """
        if task is None:
            return joined(self.values(measure, each, limit) for each in self.tasks)
        having, on_val = self._having(measure), measure.startswith("val_") or measure in OF_RANKINGS
        values = np.mean([self._of_seed(n, measure, task)[:limit] for n in having], axis=0)
        arrays = self.arrays[having[0]]
        ids, (clusters, unit) = arrays[f"{prefix_of(task, on_val)}ids"][:limit], drawn_by(arrays, task, on_val)
        return Values(values, ids, clusters[:limit], np.full(len(ids), unit))

    def seeds(self, measure: str) -> list[float]:
        """The mean over all images of every seed that has a measure."""
        per_seed = [[self._of_seed(n, measure, task) for task in self.tasks] for n in self._having(measure)]
        return [float(np.concatenate(values).mean()) for values in per_seed]

    def count(self, task: str) -> int:
        """How many images of a task its figures are of."""
        return len(self.arrays[0][f"{prefix_of(task, self.on_val)}ids"])

    def _having(self, measure: str) -> list[int]:
        """The places of the seeds that have a measure on every task."""
        name = ALL_MEASURES[measure].array
        return [n for n, arrays in enumerate(self.arrays) if all(f"{task}.{name}" in arrays for task in self.tasks)]

    def _of_seed(self, n: int, measure: str, task: str) -> np.ndarray:
        name, scale, offset = ALL_MEASURES[measure]
        return self.arrays[n][f"{task}.{name}"].astype(float) * scale + offset


@lru_cache(maxsize=1024)  # table, pictures and sentences of one report ask for the same ones
def change(setting: Setting, task: str | None = None, limit: int | None = None, measure: str = "accuracy") -> Interval:
    """Points by which a measure differs from the unpruned accuracy, paired by image, with its 95 % interval.

    Where the model gives no accuracy, both are of what stands for it (`Setting.worth`).

    Of test images, or of validation images where no others were looked at. Intervals draw whole groups; there is
    none where all images belong to one (`Interval.is_known`).

    Args:
        task: one task; None for all images of all tasks.
        limit: only the first so many images of each task.
    """
    ours, unpruned = (setting.values(setting.shown(name), task, limit) for name in (measure, "unpruned"))
    return paired_interval(ours.values, unpruned.values, ours.clusters)


def subset(settings: Sequence[Setting]) -> int | None:
    """How many images of each task the oracles saw; None without oracles, or where they saw what all others did."""
    seen = [setting.count(task) for setting in settings if setting.is_oracle for task in setting.tasks]
    others = [setting.count(task) for setting in settings if not setting.is_oracle for task in setting.tasks]
    return min(seen) if seen and others and min(seen) < max(others) else None


def worth_of(settings: Sequence[Setting]) -> str:
    """What settings are judged by, in words."""
    return " or ".join(dict.fromkeys(setting.worth for setting in settings)) or "accuracy"


def all_tasks(settings: Sequence[Setting]) -> list[str]:
    """The tasks of any setting, in the order in which they are named first."""
    return list(dict.fromkeys(task for setting in settings for task in setting.tasks))


def mean(setting: Setting, measure: str = "accuracy", task: str | None = None, limit: int | None = None) -> float:
    """Over images and seeds; of one task, or of all images of all tasks."""
    return float(setting.values(setting.shown(measure), task, limit).values.mean())


def prefix_of(task: str, on_val: bool) -> str:
    """What the names of a task's arrays begin with, of its test images or of its validation images."""
    return f"{task}.val_" if on_val else f"{task}."


def drawn_by(arrays: Arrays, task: str, on_val: bool) -> tuple[np.ndarray, str]:
    """What statistics draw each of a task's images with (n,), and the word for one of those.

    Old records have ids alone. The id of an embedded scene tells its digit. Other images of old records stand for
    themselves: where data has groups, today's trials have other ids, so that no old record is among them.
    """
    prefix = prefix_of(task, on_val)
    if f"{prefix}groups" in arrays:
        return arrays[f"{prefix}groups"], str(arrays[f"{prefix}unit"])
    ids = arrays[f"{prefix}ids"].tolist()
    scenes = [OLD_SCENE.fullmatch(name) for name in ids]
    if all(scenes):
        return np.asarray([f"digit/{scene[1]}" for scene in scenes]), "digit"
    return np.asarray([f"{task}/{name}" for name in ids]), "image"


def configuration(config: dict) -> dict[str, Any]:
    """What tells one setting from another, by dotted path: all but seed and controls.

    Without prompts nothing else in that section is read: `prompt: null` and `prompt: {mode: none, ...}` are the same.
    Nor do `leftovers: null` and `drop` differ, since a reducer that merges by itself never has `drop`.
    """
    found = {path: value for path, value in leaves(config).items() if path not in ("seed", "controls", "prompt")}
    if found.get("pruning.leftovers", "") is None:
        found["pruning.leftovers"] = "drop"
    if found.get("prompt.mode", "none") == "none":
        found = {path: value for path, value in found.items() if path.split(".")[0] != "prompt"}
        found["prompt.mode"] = "none"
    return found


def read_settings(trials: Sequence[Trial]) -> list[Setting]:
    """Turns trials in plan order into settings, in the order of their first trial.

    Where several trials are of one setting and seed, the first counts. It takes controls that it lacks from the others.
    """
    groups: dict[str, dict[int, Trial]] = {}
    for row, arrays in trials:
        seeds = groups.setdefault(json.dumps(configuration(row["config"]), sort_keys=True), {})
        first, known = seeds.get(row["config"]["seed"], (row, arrays))
        controls = {name: values for name, values in arrays.items() if name.rpartition("right_")[2] in CONTROLS}
        seeds[row["config"]["seed"]] = first, controls | known
    on_val = any(row["config"]["data"]["n_test"] == 0 for row, _ in trials)  # all rows of a table show the same images
    members = [list(seeds.values()) for seeds in groups.values()]
    return [Setting([row for row, _ in each], [arrays for _, arrays in each], on_val) for each in members]


def read_trial(root: str, row: dict) -> Trial:
    """A row of the sweep in `root`, with what its trial saved of each image.

    Raises:
        FileNotFoundError: it saved nothing, or that was removed.
        UserError: the file is damaged, or the row lacks what every trial writes.
    """
    path, cure = join(root, "trials", f"{row['id']}.npz"), "try removing it, and its trial is run again"
    for key in NEEDED:
        if not _is_sound(row.get(key), key):
            raise UserError(f"{path.removesuffix('npz')}json: lacks a sound {key!r}; {cure}")
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as arrays:
            return row, dict(arrays)
    except (FileNotFoundError, StoreError):
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {cure}") from error


def _is_sound(value: Any, key: str) -> bool:
    """Whether a value of a row is what trials write there."""
    if not isinstance(value, NEEDED[key]):
        return False
    if key == "metrics":
        return isinstance(value.get("gmacs"), int | float) and isinstance(value.get("tasks", {}), dict)
    if key == "env":
        return ENV <= value.keys()
    return key != "date" or re.fullmatch(r"\d{4}-\d\d-\d\d", value) is not None
