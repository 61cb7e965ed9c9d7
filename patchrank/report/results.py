"""Result rows and the arrays beside them, put together: one `Setting` per point of a sweep, its seeds merged."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patchrank.files import join, read_bytes

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
ON_VAL = {"matching", "matching_prior", "kendall", "ndcg"} | {name for name in MEASURES if name.startswith("val_")}


@dataclass(frozen=True)
class Values:
    """One number an image: values (n,), the images' ids (n,), and the unit that each belongs to (n,), as in `ids`."""

    values: np.ndarray
    ids: np.ndarray

    @property
    def clusters(self) -> np.ndarray:
        """Images of one digit belong together, whichever task drew it: `digits/test/0123-2` to `0123`."""
        return np.asarray([str(name).rsplit("/", 1)[-1].split("-")[0] for name in self.ids])


@dataclass(frozen=True)
class Setting:
    """All rows of a sweep that differ in their seed alone, and the per-image arrays of each.

    on_val: no trial looked at test (`data.n_test: 0`), so what is shown is of validation images.
    """

    rows: list[dict]
    arrays: list[dict[str, np.ndarray]]
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
        return self.config["pruning"]["reducer"] in ("predictor", "prior")

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The rows' metrics that are plain numbers, averaged over seeds."""
        shared = [key for key, value in self.rows[0]["metrics"].items() if isinstance(value, int | float)]
        shared = [key for key in shared if all(key in row["metrics"] for row in self.rows)]
        return {key: float(np.mean([row["metrics"][key] for row in self.rows])) for key in shared}

    def shown(self, measure: str) -> str:
        """A measure, or where no test image was looked at, the one of validation images that stands in its place."""
        return f"val_{measure}" if self.on_val and f"val_{measure}" in MEASURES else measure

    def has(self, measure: str) -> bool:
        return all(f"{task}.{MEASURES[measure][0]}" in arrays for task in self.tasks for arrays in self.arrays)

    def values(self, measure: str, task: str | None = None, limit: int | None = None) -> Values:
        """One number an image, averaged over seeds, of one task or of all of them.

        Args:
            limit: only the first so many images of each task (the oracles' subset).
        """
        per_seed = [self._of_seed(arrays, measure, task, limit) for arrays in self.arrays]
        return Values(np.mean([values for values, _ in per_seed], axis=0), per_seed[0][1])

    def seeds(self, measure: str, task: str | None = None, limit: int | None = None) -> list[float]:
        """The mean of every seed; its spread is what seeds are worth."""
        return [float(self._of_seed(arrays, measure, task, limit)[0].mean()) for arrays in self.arrays]

    def count(self, task: str) -> int:
        """Images of a task that its figures are of."""
        return len(self.arrays[0][f"{task}.{'val_ids' if self.on_val else 'ids'}"])

    def _of_seed(
        self, arrays: dict[str, np.ndarray], measure: str, task: str | None, limit: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        name, scale, *offset = MEASURES[measure]
        ids = "val_ids" if measure in ON_VAL else "ids"
        tasks = [task] if task else self.tasks
        values = np.concatenate([arrays[f"{task}.{name}"][:limit].astype(float) for task in tasks])
        values = values * scale + sum(offset)
        return values, np.concatenate([arrays[f"{task}.{ids}"][:limit] for task in tasks])


def read_settings(rows: Sequence[dict], root: str) -> list[Setting]:
    """Rows in plan order to settings in the order of their first row."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        config = {key: value for key, value in row["config"].items() if key != "seed"}
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(row)
    arrays = [[_arrays(root, row) for row in group] for group in groups.values()]
    on_val = any(row["config"]["data"]["n_test"] == 0 for row in rows)  # in one table all stand on the same images
    return [Setting(group, found, on_val) for group, found in zip(groups.values(), arrays)]


def _arrays(root: str, row: dict) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(read_bytes(join(root, "trials", f"{row['id']}.npz"))), allow_pickle=False) as arrays:
        return dict(arrays)
