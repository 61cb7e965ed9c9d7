"""What trials of the same model and data share: the pair, the images of its tasks, and results computed from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from patchrank.config import DataConfig, ModelConfig
from patchrank.data.dataset_factory import find_task, load_split
from patchrank.data.image_split import ImageSplit
from patchrank.models.answers import Neighbours, places_apart
from patchrank.models.captions import template_set
from patchrank.models.clip import Clip, create_clip
from patchrank.models.embed import embed_shared, embed_unpruned
from patchrank.utils.device import check_device

PARTS = {"train": "n_train", "val": "n_val", "test": "n_test"}
IN_MEMORY = 1 << 29  # bytes that the images of a split, or its tokens, may take
REMEMBERED = 1 << 32  # bytes of results kept; most are tokens of shards, 16 KiB an image here, 588 KiB on B/16


class Reference(NamedTuple):
    """A split, with its images in memory if they fit, and their unpruned embeddings (n, E)."""

    split: ImageSplit
    unpruned: Tensor


@dataclass
class Inputs:
    """The pair, unpruned, and the data of one or more tasks. Trials of the same model and data share one.

    fingerprints: of what trials read, by what decides on it beside model and data (`patchrank.trial.identity`).
    """

    clip: Clip
    data: DataConfig
    fingerprints: dict[tuple, dict[str, str]] = field(default_factory=dict, init=False)
    _splits: dict[tuple[str, str], ImageSplit] = field(default_factory=dict, init=False)
    _references: dict[tuple[str, str], Reference] = field(default_factory=dict, init=False)
    _recent: OrderedDict[tuple, object] = field(default_factory=OrderedDict, init=False)

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
            self._references[task, part] = Reference(split, embed_unpruned(self.clip, split))
        return self._references[task, part]

    def neighbours(self, task: str, part: str) -> Neighbours | None:
        """The training images that answer for a part where the model has no text tower; None without labels."""
        split = self.split(task, part)
        if self.clip.has_text or split.labels is None:
            return None
        labelled, unpruned = self.reference(task, "train")
        if labelled.labels is None or not (places := places_apart(labelled, split)):
            return None
        return Neighbours(unpruned[places], torch.tensor(labelled.labels)[places])

    def shared_tokens(self, task: str, part: str) -> Tensor | None:
        """A split's tokens at the last layer whose input the pruning in force leaves alone; None if they do not fit."""
        if part == "oracle":
            tokens = self.shared_tokens(task, "test")
            return None if tokens is None else tokens[: self.data.n_oracle]
        split, tower = self.reference(task, part).split, self.clip.visual
        size = 4 * len(split) * (tower.num_patches + tower.num_leading_tokens) * tower.embed_dim
        if tower.num_prompt_tokens or size > IN_MEMORY:  # learned tokens change a sequence from its start
            return None
        key = "tokens", task, part, tower.shared_layer
        return self.once(key, lambda: embed_shared(self.clip, split))

    def once(self, key: tuple, compute: Callable[[], object]) -> object:
        """The result of `compute`, kept as long as memory allows; `key` names all that it depends on."""
        if key not in self._recent:
            self._recent[key] = compute()
        self._recent.move_to_end(key)
        while len(self._recent) > 1 and sum(map(num_bytes, self._recent.values())) > REMEMBERED:
            self._recent.popitem(last=False)
        return self._recent[key]

    @cached_property
    def sha256(self) -> str:
        """Of the pair's weights, which nothing changes while trials run."""
        return self.clip.sha256()


def num_bytes(result: object) -> int:
    """Bytes that a tensor, an array, or a collection of them takes in memory."""
    if isinstance(result, (tuple, list)):
        return sum(map(num_bytes, result))
    return sum(map(num_bytes, result.values())) if isinstance(result, dict) else getattr(result, "nbytes", 0)


def load_part(task: str, part: str, data: DataConfig, limit: int | None) -> ImageSplit:
    """The first images of a part of a task's data; `train` is whatever the task calls its training split."""
    name = find_task(task).training if part == "train" else part
    return load_split(task, name, limit, data.root, data.vocabulary, template_set(data.templates))


def load_inputs(model: ModelConfig, data: DataConfig, device: str = "cpu", heads: str | None = None) -> Inputs:
    """The pair and the data of all trials that have these settings.

    Args:
        heads: folder or URL where class embeddings are kept between processes.

    Raises:
        UserError: a model, checkpoint or device that cannot be had.
    """
    check_device(device)
    settings = {"checkpoint": model.checkpoint, "img_size": model.img_size}
    clip = create_clip(model.name, device=device, keep_rate=1.0, **settings)  # a folder may hold a pruned tower
    clip.heads = heads
    return Inputs(clip, data)
