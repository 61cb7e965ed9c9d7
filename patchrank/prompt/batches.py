"""The images that prompts are tuned on: few of each class as CoOp draws them, or many without labels; seeded order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, normalize, resized_crop, to_tensor

from patchrank.config import DEFAULTS, DataConfig, PromptConfig
from patchrank.data.class_names import read_vocabulary
from patchrank.data.coop import NAMED
from patchrank.data.dataset_factory import find_task, load_split
from patchrank.data.few_shot import few_shot, load_few_shot
from patchrank.data.image_split import ImageSplit, ahead
from patchrank.models.captions import template_set
from patchrank.models.clip import Clip
from patchrank.models.embed import over_batches, unit
from patchrank.utils.errors import UserError

IN_MEMORY = 1 << 30  # bytes that transformed images may take
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the crops
_DRAWING = Lock()  # torchvision draws from torch's global generator, which reading threads share


def load_train(task: str, config: PromptConfig, seed: int, data: DataConfig = DEFAULTS.data) -> ImageSplit:
    """What a configuration learns from: shots of each class, or for distillation the first images, both of training.

    Shots come in the order of the draw. Embedded tasks are drawn from in their own order, named ones in the order of
    their split files; folders and tars, which have none, in the order in which they are read.

    Args:
        data: root, vocabulary and templates are read of it.

    Raises:
        UserError: images that cannot be loaded, or shots without labels or class names.
    """
    training, templates = find_task(task).training, template_set(data.templates)
    where = data.root, data.vocabulary, templates
    if config.loss == "distill":
        return load_split(task, training, config.images, *where)
    if task in NAMED:
        drawn, _ = load_few_shot(task, config.shots, seed, data.root)
        drawn = drawn if data.vocabulary is None else read_vocabulary(data.vocabulary).apply(drawn)
        return drawn if templates is None else replace(drawn, templates=templates)
    train = check_named(load_split(task, training, None, *where))
    return train.take(few_shot(train.labels, [], config.shots, seed)[0])


def check_named(split: ImageSplit) -> ImageSplit:
    """Raises `UserError` for images without labels or class names; others are given back."""
    lacking = "labels" if split.labels is None else "class names" if not split.classes else None
    if lacking is not None:
        raise UserError(
            f"{split.task}/{split.split}: prompts need labels and class names, but there are no {lacking}; "
            "try --vocabulary"
        )
    return split


class Augment:
    """CoOp's training transform: a crop of 8 to 100 % of the area, bicubic, a flip half of the time, normalised.

    The same image in the same epoch of the same seed gets the same crop, whatever was drawn before.
    """

    def __init__(self, clip: Clip, seed: int):
        settings = clip.transform_settings()
        self.size, self.seed = settings["input_size"][1:], seed
        self.mean, self.std = settings["mean"], settings["std"]

    def __call__(self, image: Image.Image, epoch: int, place: int) -> Tensor:
        box, flip = self._draw(image, int(np.random.default_rng([self.seed, epoch, place]).integers(1 << 62)))
        image = resized_crop(image, *box, self.size, InterpolationMode.BICUBIC)
        return normalize(to_tensor(hflip(image) if flip else image), self.mean, self.std)

    def _draw(self, image: Image.Image, seed: int) -> tuple[tuple[int, int, int, int], bool]:
        with _DRAWING, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)), bool(torch.rand(1) < 0.5)


class Feed:
    """The images of each epoch in batches, shuffled by seed and epoch alone, so that any epoch can be the next.

    Args:
        config: complete.
        cache: embeds all images once, where nothing about their embeddings changes.

    Attributes:
        cached: whether batches are of embeddings (b, E), unit vectors, instead of images (b, 3, H, W).
        steps: batches in an epoch; a rest is left out, unless it is all there is.
    """

    def __init__(self, clip: Clip, train: ImageSplit, config: PromptConfig, seed: int, cache: bool = True):
        self.clip, self.config, self.seed = clip, config, seed
        self.transform, self.batch_size = clip.transform(), config.batch_size
        self.augment = Augment(clip, seed) if config.augment else None
        self.split = train if config.augment else train.loaded(self.transform, IN_MEMORY)
        self.device, cache = clip.logit_scale.device, cache and not config.augment
        self.cached = cache and config.mode == "T"
        self.steps = max(1, len(train) // self.batch_size)
        self.rows = self._all(self.embed) if self.cached else self.split.tensors
        if config.loss == "distill":
            self.targets = self._all(self.embed_whole) if cache else None
        else:
            self.targets = torch.tensor(train.labels)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images or embeddings, and what they should tell: labels (b,), or the embeddings (b, E) to come back to."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.split)).tolist()
        size = self.batch_size
        parts = [order[step * size : (step + 1) * size] for step in range(self.steps)]
        if self.rows is None:
            loaded = ahead(lambda place: self._read(epoch, place), parts)
        else:
            loaded = ((self.rows[part], part) for part in parts)
        for rows, part in loaded:
            rows = rows.to(self.device)
            yield rows, self.embed_whole(rows) if self.targets is None else self.targets[part].to(self.device)

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (b, E), with pruning and prompts as they are in force."""
        return unit(self.clip.visual.forward_pruned(images).embedding)

    @torch.no_grad()
    def embed_whole(self, images: Tensor) -> Tensor:
        """Unit vectors (b, E) of the tower as it came: nothing pruned, no prompts."""
        return unit(self.clip.visual.forward_whole(images))

    def _read(self, epoch: int, place: int) -> Tensor:
        image = self.split.image(place)
        return self.transform(image) if self.augment is None else self.augment(image, epoch, place)

    def _all(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function gives for all images, (n, E)."""
        batches = self.split.batches(self.transform, self.batch_size)
        with autocast(self.config, self.device):
            return torch.cat(over_batches(self.clip, batches, lambda images, _: function(images)))


def autocast(config: PromptConfig, device: torch.device) -> torch.autocast:
    """The precision that a configuration gives the towers."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
