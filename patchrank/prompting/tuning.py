"""Tunes prompts: cross-entropy by SGD over P_t and M alone, with pruning in force and both towers frozen."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from patchrank.config import PromptConfig
from patchrank.data.images import ImageSplit
from patchrank.errors import UserError
from patchrank.evaluate import BATCH_SIZE
from patchrank.files import content_id, exists, remove, weights_sha256
from patchrank.layers.prompts import Prompts
from patchrank.metrics import percent
from patchrank.models.clip import Clip
from patchrank.models.prompt_files import describe, load_prompts, save_prompts
from patchrank.prompting.logs import Logs
from patchrank.prompting.presets import MOMENTUM, WEIGHT_DECAY, learning_rates
from patchrank.prompting.shots import Feed, embed
from patchrank.prompting.state import State, restore_state, save_state

VERSION = 1  # of the tuning: bump it when the same images would give other prompts


class Tuned(NamedTuple):
    """prompts; about, what their file says of them; seconds of each epoch, none where the file was there already."""

    prompts: Prompts
    about: dict
    seconds: list[float]


def tune_prompts(
    clip: Clip,
    train: ImageSplit,
    val: ImageSplit | None,
    config: PromptConfig,
    seed: int,
    out: str,
    quiet: bool = False,
    cache: bool = True,
    logs: str | None = None,
) -> Tuned:
    """Learned tokens for a pair and the classes of `train`, written to `out`; the pair stays as it is.

    After every epoch its state is written beside `out`; the same call goes on from there, and ends with the same
    bytes. A finished file of the same run is read, and nothing is trained.

    Args:
        train: labelled images, a few of each class.
        val: looked at if `config.patience` says so, and not else; the prompts are then of its best epoch.
        config: complete (`presets.complete`), of a mode that learns something.
        seed: of the start, and of order and augmentation in every epoch.
        cache: embeds images once where nothing about them changes; changes time alone, and figures by float noise.
        logs: folder for TensorBoard.

    Raises:
        UserError: impossible prompts, or a loss that is no number.
    """
    run = run_id(clip, train, val, config, seed)
    if (known := _finished(out, run)) is not None:
        return Tuned(known.to(clip.logit_scale.device), known.about, [])
    with frozen(clip), torch.inference_mode(False), torch.enable_grad():
        state = start(clip, train, config, seed)
        restore_state(state, state_path(out), run)
        feed = Feed(clip, train, config, seed, cache)
        clip.set_prompts(state.prompts)
        _run(clip, feed, train, val, config, state, lambda: save_state(state, state_path(out), run), quiet, logs)
    if state.best:
        state.prompts.load_state_dict(state.best)
    about = {**describe(clip), **_about(train, val, config, seed, state), "run": run}
    save_prompts(state.prompts, out, about)
    remove(state_path(out))
    return Tuned(state.prompts, about, [epoch["seconds"] for epoch in state.history])


def run_id(clip: Clip, train: ImageSplit, val: ImageSplit | None, config: PromptConfig, seed: int) -> str:
    """Names all that tuned prompts depend on."""
    reducer = None if clip.visual.pruner is None else weights_sha256(clip.visual.pruner.reducer)
    watched = val if config.patience is not None else None
    seen = [
        None if split is None else [split.task, split.ids_sha256(), split.labels, split.classes, split.templates]
        for split in (train, watched)
    ]
    settings = [config.model_dump(), seed, clip.transform_settings()]
    return content_id([VERSION, describe(clip), reducer, seen, settings])


def state_path(out: str) -> str:
    return f"{out}.state"


def start(clip: Clip, train: ImageSplit, config: PromptConfig, seed: int) -> State:
    """Prompts that have learned nothing yet, on the pair's device, and their optimizer."""
    prompts = Prompts(
        config.mode,
        config.num_tokens,
        clip.text.width,
        clip.visual.embed_dim,
        classes=train.classes if config.class_specific else None,
        bias=config.bias,
        seed=seed,
        words=None if config.words is None else clip.embed_words(config.words).cpu(),
    ).to(clip.logit_scale.device)
    return State(prompts, torch.optim.SGD(prompts.parameters(), momentum=MOMENTUM, weight_decay=WEIGHT_DECAY))


@contextmanager
def frozen(clip: Clip) -> Iterator[None]:
    """The pair in evaluation mode and without gradients; afterwards it is as it was, its own prompts included."""
    modes = [(module, module.training) for module in clip.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in clip.parameters()]
    prompts = clip.prompts
    try:
        clip.eval().requires_grad_(False)
        yield
    finally:
        clip.set_prompts(prompts)
        for module, training in modes:
            module.training = training
        for parameter, value in wanted:
            parameter.requires_grad_(value)


def _run(
    clip: Clip,
    feed: Feed,
    train: ImageSplit,
    val: ImageSplit | None,
    config: PromptConfig,
    state: State,
    save: Callable[[], None],
    quiet: bool,
    logs: str | None,
) -> None:
    """The epochs that are still to come; `save` writes the state after each."""
    rates, writer = learning_rates(config.lr, config.epochs), Logs(logs)
    bar = tqdm(total=config.epochs * feed.steps, initial=len(state.history) * feed.steps, unit="step", disable=quiet)
    bar.set_description(f"tune {config.mode}")
    while not state.is_done(config.epochs, config.patience):
        epoch, started = len(state.history), time.perf_counter()
        state.optimizer.param_groups[0]["lr"] = rates[epoch]
        measured = train_epoch(clip, feed, train, state, epoch, bar)
        if config.patience is not None:
            measured["val_accuracy"] = accuracy(clip, val)
        state.history.append(measured | {"seconds": round(time.perf_counter() - started, 3)})
        state.remember_best()
        save()
        writer.write(epoch, state.history[-1] | {"lr": rates[epoch]})
    bar.close()
    writer.close()


def train_epoch(clip: Clip, feed: Feed, train: ImageSplit, state: State, epoch: int, bar: tqdm) -> dict[str, float]:
    """One pass over the training images: mean loss, and accuracy (%) while they were learned from."""
    losses, right = [], []
    for rows, labels in feed.batches(epoch):
        loss, logits = step(clip, feed, train, state, rows, labels)
        if not math.isfinite(loss):
            rate = state.optimizer.param_groups[0]["lr"]
            raise UserError(f"epoch {epoch + 1}: the loss is {loss} at learning rate {rate:g}; near: a lower --lr")
        losses.append(loss)
        right.extend((logits.argmax(-1) == labels).tolist())
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{percent(np.asarray(right)):.1f} %", refresh=False)
        bar.update()
    return {"loss": sum(losses) / len(losses), "accuracy": percent(np.asarray(right))}


def step(clip: Clip, feed: Feed, train: ImageSplit, state: State, rows: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """One step of the optimizer on images, or on their embeddings where these are cached: loss and logits (b, C)."""
    logits = clip.logit_scale.exp() * _embed(clip, feed, state.prompts, rows) @ _head(clip, train, state.prompts).T
    loss = F.cross_entropy(logits, labels)
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    return loss.item(), logits.detach()


def _embed(clip: Clip, feed: Feed, prompts: Prompts, rows: Tensor) -> Tensor:
    if feed.cached:
        return rows
    with torch.set_grad_enabled(prompts.inserts_visual):
        return embed(clip, rows)


def _head(clip: Clip, split: ImageSplit, prompts: Prompts) -> Tensor:
    """Class embeddings that gradients pass through; the hand-written text's in mode V."""
    if prompts.inserts_text:
        return clip.prompted_head(split.classes, prompts)
    return clip.zero_shot_head(split.classes, split.templates)


@torch.inference_mode()
def accuracy(clip: Clip, split: ImageSplit) -> float:
    """Accuracy (%) on a split with pruning and prompts in force: the figure that `patchrank.evaluate` gives."""
    head, device, answers = clip.zero_shot_head(split.classes, split.templates), clip.logit_scale.device, []
    for images, _ in split.batches(clip.transform(), BATCH_SIZE):
        answers.append((embed(clip, images.to(device)) @ head.T).argmax(-1).cpu())
    return percent(torch.cat(answers).numpy() == np.asarray(split.labels))


def _finished(out: str, run: str) -> Prompts | None:
    """The prompts that this very run left; None where there is no such file, or it is of another."""
    if not exists(out):
        return None
    try:
        prompts, about = load_prompts(out)
    except UserError as error:
        print(f"{error}: it is written anew", file=sys.stderr)
        return None
    return prompts if about.get("run") == run else None


def _about(train: ImageSplit, val: ImageSplit | None, config: PromptConfig, seed: int, state: State) -> Mapping:
    """What the file says beside model and pruning; no times, so that the same run gives the same bytes."""
    history = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in state.history]
    best = state.best_epoch()
    return {
        "config": config.model_dump(),
        "seed": seed,
        "seen": seen(train, val, config),
        "history": history,
        "epoch": len(history) if best is None else best + 1,
    }


def seen(train: ImageSplit, val: ImageSplit | None, config: PromptConfig) -> dict:
    """How many images and labels decided on the prompts, and whose."""
    count = len(train) + (len(val) if config.patience is not None else 0)
    return {"task": train.task, "split": train.split, "shots": config.shots, "images": count, "labels": count}
