"""What trials work on and share: the pair, the splits of its tasks, and what was computed from them once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from patchrank import evaluate as evaluation
from patchrank.config import DataConfig, TrialConfig
from patchrank.data.dataset_factory import find_task, load_split
from patchrank.data.image_split import ImageSplit
from patchrank.golden.dataset import Ranked, read_ranked
from patchrank.io import content_id
from patchrank.models.clip import Clip, create_clip
from patchrank.models.text import template_set
from patchrank.utils.device import check_device

PARTS = {"train": "n_train", "val": "n_val", "test": "n_test"}
IN_MEMORY = 1 << 29  # bytes that the images of a split, or its tokens, may take
REMEMBERED = 1 << 32  # bytes of results kept, tokens of shards above all: 16 KiB an image here, 588 KiB on B/16


class Reference(NamedTuple):
    """A split, with its images in memory if they fit, and their unpruned embeddings (n, E)."""

    split: ImageSplit
    unpruned: Tensor


@dataclass
class Inputs:
    """The pair, unpruned, and the data of one or more tasks. Trials of the same model and data share one."""

    clip: Clip
    data: DataConfig
    _splits: dict[tuple[str, str], ImageSplit] = field(default_factory=dict)
    _references: dict[tuple[str, str], Reference] = field(default_factory=dict)
    _recent: OrderedDict[tuple, object] = field(default_factory=OrderedDict)

    def split(self, task: str, part: str) -> ImageSplit:
        """The images of a task for `train`, `val`, `test`, or the `oracle` that sees the first test images alone."""
        if part == "oracle":
            return self.split(task, "test").first(self.data.n_oracle)
        if (task, part) not in self._splits:
            self._splits[task, part] = load_part(task, part, self.data, getattr(self.data, PARTS[part]))
        return self._splits[task, part]

    def reference(self, task: str, part: str) -> Reference:
        """A split and its unpruned embeddings, computed once."""
        if part == "oracle":
            split, unpruned = self.reference(task, "test")
            return Reference(split.first(self.data.n_oracle), unpruned[: self.data.n_oracle])
        if (task, part) not in self._references:
            split = self.split(task, part).loaded(self.clip.transform(), IN_MEMORY)
            self._references[task, part] = Reference(split, evaluation.embed_unpruned(self.clip, split))
        return self._references[task, part]

    def shared_tokens(self, task: str, part: str) -> Tensor | None:
        """A split's tokens as they enter the last layer that the pruning in force does not touch, if they fit."""
        if part == "oracle":
            tokens = self.shared_tokens(task, "test")
            return None if tokens is None else tokens[: self.data.n_oracle]
        split, tower = self.reference(task, part).split, self.clip.visual
        if tower.num_prompt_tokens:  # those change a sequence from its start
            return None
        if 4 * len(split) * (tower.num_patches + tower.num_leading_tokens) * tower.embed_dim > IN_MEMORY:
            return None
        key = "tokens", task, part, tower.shared_layer
        return self.once(key, lambda: evaluation.embed_shared(self.clip, split))

    def ranked(self, path: str, metric: str, location: int, quiet: bool) -> Ranked:
        """Tokens and golden scores of a folder of shards, whose name says what it holds."""
        return self.once((path, metric, location), lambda: read_ranked(self.clip, path, metric, location, quiet))

    def once(self, key: tuple, compute: Callable[[], object]) -> object:
        """What `compute` gives; the last results are kept by a key that names all they depend on."""
        if key not in self._recent:
            self._recent[key] = compute()
        self._recent.move_to_end(key)
        while len(self._recent) > 1 and sum(map(num_bytes, self._recent.values())) > REMEMBERED:
            self._recent.popitem(last=False)
        return self._recent[key]

    def fingerprint(self, tasks: Sequence[str]) -> dict:
        """Of weights and data: part of a trial's identity. Where trials do not look at test, neither does this."""
        parts = [part for part, count in PARTS.items() if getattr(self.data, count) != 0]
        splits = [self.split(task, part) for task in tasks for part in parts]
        data = [[split.ids_sha256(), split.labels, split.classes, split.templates] for split in splits]
        # groups that files tell are data; those of scenes stand in their ids, and other images have none
        data += [[split.groups] for split in splits if split.unit == "group"]
        return {"model": self.sha256, "data": content_id(data)}

    @cached_property
    def sha256(self) -> str:
        """Of the pair's weights, which nothing changes while trials run."""
        return self.clip.sha256()


def num_bytes(result: object) -> int:
    """What a tensor, an array, or a collection of such takes in memory."""
    if isinstance(result, (tuple, list)):
        return sum(map(num_bytes, result))
    return sum(map(num_bytes, result.values())) if isinstance(result, dict) else getattr(result, "nbytes", 0)


def load_part(task: str, part: str, data: DataConfig, limit: int | None) -> ImageSplit:
    """The first images of a part of a task's data; `train` is whatever the task calls its training split."""
    name = find_task(task).training if part == "train" else part
    return load_split(task, name, limit, data.root, data.vocabulary, templates_of(data))


def templates_of(data: DataConfig) -> tuple[str, ...] | None:
    """Prompts in place of each task's own, None where those hold."""
    return None if data.templates is None else template_set(data.templates)


def load_inputs(trial: TrialConfig, device: str = "cpu", heads: str | None = None) -> Inputs:
    """The pair and the data of a trial; `heads` is where class embeddings are kept between processes.

    Raises:
        UserError: a model, checkpoint or device that cannot be had.
    """
    check_device(device)
    clip = create_clip(trial.model.name, checkpoint=trial.model.checkpoint, device=device)
    clip.heads = heads
    return Inputs(clip, trial.data)


def mean_over(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means of what all rows have."""
    shared = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: float(np.mean([row[key] for row in rows])) for key in shared}
