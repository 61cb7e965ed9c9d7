"""Result rows and the arrays beside them, put together: one `Setting` per point of a sweep, its seeds merged."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from patchrank.config import leaves
from patchrank.data.digits.scenes import STYLES, digit_of
from patchrank.io import join, read_bytes

# what can be compared: measure -> array of the trial, and how it is shown: times a factor, and plus an offset
MEASURES = {
    "accuracy": ("right_pruned", 100),
    "unpruned": ("right_unpruned", 100),
    "random": ("right_random", 100),  # the controls that a trial ran beside its own ranking
    "reversed": ("right_reversed", 100),
    "agreement": ("same", 100),
    "cosine": ("cosine", 1),
    "drift": ("cosine", -1000, 1000),  # thousandths of 1 - cosine
    "matching": ("matching", 1),  # on validation images, as all that follow
    "matching_prior": ("matching_prior", 1),
    "kendall": ("kendall", 1),
    "ndcg": ("ndcg", 1),
    "val_accuracy": ("val_right_pruned", 100),
    "val_unpruned": ("val_right_unpruned", 100),
    "val_agreement": ("val_same", 100),
    "val_cosine": ("val_cosine", 1),
    "val_drift": ("val_cosine", -1000, 1000),
}
FITTED = ("predictor", "prior")  # reducers whose ranking learned from golden scores of other images
CONTROLS = {"random", "reversed"}  # which a setting may have run with some of its seeds alone
ON_VAL = {"matching", "matching_prior", "kendall", "ndcg"} | {name for name in MEASURES if name.startswith("val_")}


Arrays = dict[str, np.ndarray]  # what a trial saved of its images, by name


@dataclass(frozen=True)
class Values:
    """One number for each of n images, in the order of the images.

    values: (n,). ids: (n,), the images' names. clusters: (n,), what statistics draw each image with: equal for images
    that belong together. units: (n,), the word for that: "digit", "group", or "image" where it stands for itself.
    """

    values: np.ndarray
    ids: np.ndarray
    clusters: np.ndarray
    units: np.ndarray


@dataclass(frozen=True, eq=False)  # compared and hashed as the object that it is
class Setting:
    """All rows of a sweep that differ in their seed (and the controls beside them) alone, and the arrays of each.

    on_val: no trial looked at test (`data.n_test: 0`), so what is shown is of validation images.
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
        """Whether it was ranked by scores that were computed on the very images, on a subset of them."""
        return self.config["pruning"]["reducer"] == "golden"

    @property
    def is_fitted(self) -> bool:
        """Whether its ranking was fitted to golden scores of other images."""
        return self.config["pruning"]["reducer"] in FITTED

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The rows' metrics that are plain numbers, averaged over seeds."""
        found = {key: [row["metrics"].get(key) for row in self.rows] for key in self.rows[0]["metrics"]}
        shared = {key: each for key, each in found.items() if all(isinstance(value, int | float) for value in each)}
        return {key: float(np.mean(each)) for key, each in shared.items()}

    def shown(self, measure: str) -> str:
        """A measure, or where no test image was looked at, the one of validation images that stands in its place."""
        return f"val_{measure}" if self.on_val and f"val_{measure}" in MEASURES else measure

    def has(self, measure: str) -> bool:
        """Whether all seeds have a measure; of a control, which need not run with all of them, whether any has it."""
        having = len(self._having(measure))
        return having > 0 if measure in CONTROLS else having == len(self.arrays)

    def unit(self, task: str) -> str:
        """The word for what a task's images are drawn by: digit, group, or image."""
        return _unit(self.arrays[0], task)

    def seeds_with(self, measure: str) -> list[int]:
        """The seeds that have a measure."""
        having = self._having(measure)
        return [
            row["config"]["seed"]
            for row, arrays in zip(self.rows, self.arrays)
            if any(arrays is each for each in having)
        ]

    def values(self, measure: str, task: str | None = None, limit: int | None = None) -> Values:
        """One number an image, averaged over the seeds that have it, of one task or of all of them.

        Args:
            limit: only the first so many images of each task (the oracles' subset).
        """
        having = self._having(measure)
        values = np.mean([self._of_seed(arrays, measure, task, limit) for arrays in having], axis=0)
        parts = [_images(having[0], each, measure in ON_VAL) for each in ([task] if task else self.tasks)]
        ids, clusters, units = (np.concatenate([part[:limit] for part in kind]) for kind in zip(*parts))
        return Values(values, ids, clusters, units)

    def seeds(self, measure: str, task: str | None = None, limit: int | None = None) -> list[float]:
        """The mean of every seed that has a measure; its spread is what seeds are worth."""
        return [float(self._of_seed(arrays, measure, task, limit).mean()) for arrays in self._having(measure)]

    def count(self, task: str) -> int:
        """Images of a task that its figures are of."""
        return len(self.arrays[0][f"{task}.{'val_ids' if self.on_val else 'ids'}"])

    def _having(self, measure: str) -> list[Arrays]:
        """The arrays of the seeds that have a measure on every task."""
        name = MEASURES[measure][0]
        return [arrays for arrays in self.arrays if all(f"{task}.{name}" in arrays for task in self.tasks)]

    def _of_seed(self, arrays: Arrays, measure: str, task: str | None, limit: int | None) -> np.ndarray:
        name, scale, *offset = MEASURES[measure]
        tasks = [task] if task else self.tasks
        values = np.concatenate([arrays[f"{task}.{name}"][:limit].astype(float) for task in tasks])
        return values * scale + sum(offset)


def _images(arrays: Arrays, task: str, on_val: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids (n,) of a task's images, what each is drawn with (n,), and the word for that (n,).

    Records from before these were saved have ids alone. An embedded scene's id tells its digit; of other data such
    records count where each image stands for itself, since data with groups has other trials' ids by now.
    """
    prefix = f"{task}.val_" if on_val else f"{task}."
    ids = arrays[f"{prefix}ids"]
    units = np.full(len(ids), _unit(arrays, task))
    if f"{prefix}groups" in arrays:
        return ids, arrays[f"{prefix}groups"], units
    return ids, np.asarray([digit_of(str(name)) if task in STYLES else f"{task}/{name}" for name in ids]), units


def _unit(arrays: Arrays, task: str) -> str:
    saved = arrays.get(f"{task}.unit", arrays.get(f"{task}.val_unit"))
    return str(saved) if saved is not None else "digit" if task in STYLES else "image"


def configuration(config: dict) -> dict[str, Any]:
    """What tells one setting from another, by dotted path: all but seed and controls.

    Without prompts nothing else that stands in that section is read: `prompt: null` and `prompt: {mode: none, ...}`
    are the same.
    """
    found = {path: value for path, value in leaves(config).items() if path not in ("seed", "controls", "prompt")}
    if found.get("prompt.mode", "none") == "none":
        found = {path: value for path, value in found.items() if path.split(".")[0] != "prompt"}
        found["prompt.mode"] = "none"
    return found


def read_settings(rows: Sequence[dict], root: str, beside: Iterable[tuple[dict, Arrays]] = ()) -> list[Setting]:
    """Rows in plan order to settings in the order of their first row.

    Where several rows are of one setting and seed, the first counts, and takes controls that it lacks from the others.

    Args:
        rows: of the sweep itself, whose arrays lie in `<root>/trials`.
        beside: rows of other sweeps, with their arrays.
    """
    groups: dict[str, dict[int, tuple[dict, Arrays]]] = {}
    for row, arrays in [*((row, read_arrays(root, row)) for row in rows), *beside]:
        seeds = groups.setdefault(json.dumps(configuration(row["config"]), sort_keys=True), {})
        first, known = seeds.get(row["config"]["seed"], (row, arrays))
        seeds[row["config"]["seed"]] = first, _controls(arrays) | known
    on_val = any(row["config"]["data"]["n_test"] == 0 for row in rows)  # in one table all stand on the same images
    members = [list(seeds.values()) for seeds in groups.values()]
    return [Setting([row for row, _ in each], [arrays for _, arrays in each], on_val) for each in members]


def read_arrays(root: str, row: dict) -> Arrays:
    """What a trial saved of each image, by name."""
    with np.load(io.BytesIO(read_bytes(join(root, "trials", f"{row['id']}.npz"))), allow_pickle=False) as arrays:
        return dict(arrays)


def _controls(arrays: Arrays) -> Arrays:
    return {name: values for name, values in arrays.items() if name.rpartition(".right_")[2] in CONTROLS}
