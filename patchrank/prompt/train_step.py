"""One step and one epoch of tuning: cross-entropy on labels, or distillation from the tower as it came."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.config import PromptConfig
from patchrank.data.image_split import ImageSplit
from patchrank.layers.norm_gains import layer_norms
from patchrank.layers.prompts import Prompts, create_prompt
from patchrank.models.clip import Clip
from patchrank.prompt.batches import Feed, autocast
from patchrank.prompt.presets import MOMENTUM, PRESETS, WEIGHT_DECAY
from patchrank.utils.errors import UserError
from patchrank.utils.progress import Bar

FIGURES = {"cross_entropy": "accuracy", "distill": "cosine"}  # what is shown beside each loss


@dataclass
class State:
    """Prompts in training.

    history: of each epoch the loss, accuracy (%) or cosine on training images, and seconds; where the run stops by val,
        also its accuracy or cosine on val.
    best: the prompts of the epoch that is best on val, where the run stops by val.
    """

    prompts: Prompts
    optimizer: torch.optim.Optimizer
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def best_epoch(self) -> int | None:
        """The epoch, from 0, that is best on val, and the first of several; None where the run does not look at val."""
        values = [epoch[key] for epoch in self.history for key in ("val_accuracy", "val_cosine") if key in epoch]
        return values.index(max(values)) if values else None

    def is_done(self, epochs: int, patience: int | None) -> bool:
        best = self.best_epoch()
        tired = patience is not None and best is not None and len(self.history) - 1 - best >= patience
        return tired or len(self.history) >= epochs


@contextmanager
def ready(clip: Clip, config: PromptConfig) -> Iterator[None]:
    """The pair frozen, in evaluation mode and without prompts, for learning; afterwards all is as it was.

    Both towers compute activations again where the configuration asks for that: less memory, a second forward pass.
    """
    both = clip.visual, getattr(clip.text, "transformer", None)
    towers = [tower for tower in both if hasattr(tower, "grad_checkpointing")]
    before = [(module, "training", module.training) for module in clip.modules()]
    before += [(weight, "requires_grad", weight.requires_grad) for weight in clip.parameters()]
    before += [(tower, "grad_checkpointing", tower.grad_checkpointing) for tower in towers]
    try:
        clip.eval().requires_grad_(False)
        for tower in towers:
            tower.grad_checkpointing = config.checkpointing
        with clip.applied(), torch.inference_mode(False), torch.enable_grad():
            clip.set_prompts(None)
            yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def start(clip: Clip, train: ImageSplit, config: PromptConfig, seed: int) -> State:
    """Prompts that have learned nothing yet, on the pair's device, and their optimizer."""
    prompts = create_prompt(
        config.name,
        config.mode,
        config.num_tokens,
        clip.text.width,
        clip.visual.embed_dim,
        classes=train.classes if config.class_specific else None,
        bias=config.bias,
        seed=seed,
        words=None if config.words is None else clip.embed_words(config.words).cpu(),
        num_norms=len(layer_norms(clip.visual)) if config.norm_gains else 0,
    ).to(clip.logit_scale.device)
    if PRESETS[config.preset].optimizer == "adam":
        return State(prompts, torch.optim.Adam(prompts.parameters()))
    return State(prompts, torch.optim.SGD(prompts.parameters(), momentum=MOMENTUM, weight_decay=WEIGHT_DECAY))


def train_epoch(feed: Feed, state: State, epoch: int, bar: Bar) -> dict[str, float]:
    """One pass over the training images: mean loss, and accuracy (%) or cosine while they were learned from."""
    losses, found, figure = [], [], FIGURES[feed.config.loss]
    for rows, targets in feed.batches(epoch):
        loss, measured = step(feed, state, rows, targets)
        if not math.isfinite(loss):
            rate = state.optimizer.param_groups[0]["lr"]
            raise UserError(f"epoch {epoch + 1}: the loss is {loss} at learning rate {rate:g}; try a lower --lr")
        losses.append(loss)
        found.extend(measured.tolist())
        mean = sum(found) / len(found)
        bar.set_postfix({"loss": f"{loss:.4g}", figure: f"{mean:.4g}"}, refresh=False)
        bar.update()
    return {"loss": sum(losses) / len(losses), figure: mean}


def step(feed: Feed, state: State, rows: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """One step of the optimizer on images, or on their embeddings where these are cached.

    Returns:
        The loss, and of each image (b,) whether it was told right, as 0 or 100, or its cosine to the target.
    """
    clip, config = feed.clip, feed.config
    with autocast(config, rows.device):
        if feed.cached:
            images = rows
        else:
            with torch.set_grad_enabled(state.prompts.inserts_visual):
                images = feed.embed(rows)
        head = None if config.loss == "distill" else head_of(clip, feed.split, state.prompts)
    if head is None:
        found = (images * targets).sum(-1)
        loss = (1 - found).mean()
    else:
        logits = clip.logit_scale.exp() * images @ head.float().T
        found, loss = 100.0 * (logits.argmax(-1) == targets), F.cross_entropy(logits, targets)
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    return loss.item(), found.detach()


def head_of(clip: Clip, split: ImageSplit, prompts: Prompts | None) -> Tensor:
    """Class embeddings (C, E), made anew from learned text so that gradients reach it; in mode V the cached ones."""
    if prompts is not None and prompts.inserts_text:
        return clip.prompted_head(split.classes, prompts)
    return clip.zero_shot_head(split.classes, split.templates)
