"""Tunes prompts: P_t, M and perhaps gains of norms learn, with pruning in force and both towers frozen.

The state after an epoch is kept in a file, from which a run goes on after a kill. Order and augmentation depend on
seed and epoch alone, so there are no random states in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from patchrank.config import PromptConfig
from patchrank.config.canonical import canonical
from patchrank.data.image_split import ImageSplit
from patchrank.io import content_id, exists, remove, weights_sha256
from patchrank.io.tensor_file import read_tensors, write_tensors
from patchrank.layers.prompts import Prompts
from patchrank.models.clip import Clip
from patchrank.models.embed import classify, embed, evaluate, split_batches
from patchrank.models.prompt_files import describe, load_prompts, save_prompts
from patchrank.prompt.batches import Feed
from patchrank.prompt.presets import PRESETS, learning_rates
from patchrank.prompt.train_step import State, head_of, ready, start, train_epoch
from patchrank.utils.errors import StoreError, UserError
from patchrank.utils.metrics import percent
from patchrank.utils.plain import plain
from patchrank.utils.progress import progress

KIND = "prompt state"  # of the file that keeps it
VERSION = 2  # of the tuning: bump it when the same images would give other prompts


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
    after_epoch: Callable[[int, Callable[[], float]], None] | None = None,
) -> Tuned:
    """Learned tokens for a pair, written to `out`; the pair stays as it is.

    After every epoch its state is written beside `out`; the same call goes on from there, and ends with the same
    bytes. A finished file of the same run is read, and nothing is trained.

    Args:
        train: labelled images, a few of each class; for distillation any images.
        val: looked at if `config.patience` says so, and not else; the prompts are then of its best epoch.
        config: complete (`presets.complete`), of a mode that learns something.
        seed: of the start, and of order and augmentation in every epoch.
        cache: embeds images once where nothing about them changes; changes time alone, and figures by float noise.
        logs: folder for TensorBoard.
        after_epoch: called after each epoch, from 1, with a function that measures the accuracy (%) on `val`, or 100
            times the cosine to the tower as it came where that is learned; what it raises ends the tuning, and the same
            call would go on from there. Nothing that is learned or written depends on it.

    Raises:
        UserError: impossible prompts, distillation where nothing is pruned, or a loss that is no number.
    """
    seed = plain(seed)
    check_distillation(config, clip.visual)
    run = run_id(clip, train, val, config, seed)
    if (known := finished(out, run)) is not None:
        return Tuned(known.to(clip.logit_scale.device), known.about, [])
    with ready(clip, config):
        state = start(clip, train, config, seed)
        restore_state(state, state_path(out), run)
        feed = Feed(clip, train, config, seed, cache)
        clip.set_prompts(state.prompts)
        _run(feed, val, state, lambda: save_state(state, state_path(out), run), quiet, logs, after_epoch)
    if state.best:
        state.prompts.load_state_dict(state.best)
    best = state.best_epoch()
    count = len(train) + (len(val) if config.patience is not None else 0)
    seen = {"task": train.task, "split": train.split, "images": count}
    seen["labels"] = 0 if config.loss == "distill" else count
    about = describe(clip) | {"config": recipe(config)[0], "seed": seed, "seen": seen, "run": run}
    # no times, so that the same run gives the same bytes
    about["history"] = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in state.history]
    about["epoch"] = len(state.history) if best is None else best + 1
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
    settings = [recipe(config), seed, clip.transform_settings()]
    return content_id([VERSION, describe(clip), reducer, seen, settings])


def recipe(config: PromptConfig) -> list:
    """All that a complete configuration does to the prompts; computing activations twice does nothing."""
    settings = canonical(config, "prompt")
    del settings["checkpointing"]
    return [settings, list(PRESETS[config.preset])]


def check_distillation(config: PromptConfig, tower: nn.Module) -> None:
    """Refuses distillation from the tower as it came where nothing is pruned."""
    if config.loss == "distill" and tower.pruner is None:
        raise UserError("loss 'distill' wins back what pruning loses, but nothing is pruned; try a lower keep_rate")


def state_path(out: str) -> str:
    return f"{out}.state"


def _run(
    feed: Feed,
    val: ImageSplit | None,
    state: State,
    save: Callable[[], None],
    quiet: bool,
    logs: str | None,
    after_epoch: Callable[[int, Callable[[], float]], None] | None,
) -> None:
    """The epochs that are still to come; `save` writes the state after each."""
    config = feed.config
    rates, total, done = learning_rates(config.lr, config.epochs), config.epochs * feed.steps, len(state.history)
    bar = progress(total=total, initial=done * feed.steps, desc=f"tune {config.mode}", unit="step", disable=quiet)
    with bar, _create_writer(logs) as writer:
        while not state.is_done(config.epochs, config.patience):
            epoch, started = len(state.history), time.perf_counter()
            state.optimizer.param_groups[0]["lr"] = rates[epoch]
            measured = train_epoch(feed, state, epoch, bar)
            watched = _watch(feed, val) if config.patience is not None else {}
            measured |= watched
            state.history.append(measured | {"seconds": round(time.perf_counter() - started, 3)})
            if state.best_epoch() == epoch:
                state.best = {key: value.detach().clone() for key, value in state.prompts.state_dict().items()}
            save()
            if writer is not None:
                for name, value in (state.history[-1] | {"lr": rates[epoch]}).items():
                    writer.add_scalar(name, value, epoch + 1)
            if after_epoch is not None:
                after_epoch(epoch + 1, lambda known=watched: _percent_of(known or _watch(feed, val)))


def _create_writer(folder: str | None) -> AbstractContextManager:
    """TensorBoard's writer of events; one that gives None where no folder is named, or nothing installed can write."""
    if folder is None:
        return nullcontext()
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("no TensorBoard logs, since tensorboardX is missing: try pip install tensorboardX", file=sys.stderr)
        return nullcontext()
    return SummaryWriter(folder)


def _watch(feed: Feed, val: ImageSplit) -> dict[str, float]:
    """How good the prompts are as they stand."""
    if feed.config.loss == "distill":
        return {"val_cosine": float(evaluate(feed.clip, val, quiet=True).cosine["pruned"].mean())}
    return {"val_accuracy": accuracy(feed.clip, val)}


def _percent_of(watched: dict[str, float]) -> float:
    """What `_watch` found as one figure of 100."""
    return 100 * watched["val_cosine"] if "val_cosine" in watched else watched["val_accuracy"]


@torch.inference_mode()
def accuracy(clip: Clip, split: ImageSplit) -> float:
    """Accuracy (%) on a split with pruning and prompts in force: the figure that `patchrank.evaluate` gives."""
    head = head_of(clip, split, clip.prompts)
    vectors, _ = embed(clip, split_batches(clip, split, quiet=True), with_unpruned=False)
    return percent(classify(vectors["pruned"], head) == np.asarray(split.labels))


def finished(out: str, run: str) -> Prompts | None:
    """The prompts that this very run left; None where there is no such file, or it is of another."""
    found = read_if_sound(load_prompts, out)
    return found[0] if found is not None and found[1].get("run") == run else None


def save_state(state: State, path: str, run: str) -> None:
    """Writes a state, whole or not at all. `run` is the id of all that the run depends on."""
    tensors = {f"prompts.{key}": value for key, value in state.prompts.state_dict().items()}
    tensors |= {f"best.{key}": value for key, value in state.best.items()}
    for key, parameter in state.prompts.named_parameters():
        tensors |= {f"optimizer.{key}:{name}": value for name, value in state.optimizer.state[parameter].items()}
    write_tensors(path, KIND, tensors, {"run": run, "history": state.history})


def read_if_sound(read: Callable[..., tuple], path: str, *args) -> tuple | None:
    """What `read(path, *args)` gives; None for a file that is not there, or is damaged, which stderr then tells."""
    if not exists(path):
        return None
    try:
        return read(path, *args)
    except StoreError:  # the file may well be there
        raise
    except UserError as error:
        print(f"{error}: it is made anew", file=sys.stderr)
        return None


def restore_state(state: State, path: str, run: str) -> None:
    """Fills a new state from a file; leaves it as it is where there is no file, or one of another run."""
    found = read_if_sound(read_tensors, path, KIND, ("run", "history"))
    if found is None:
        return
    tensors, about = found
    if about["run"] != run:
        print(f"{path}: of a run with other settings, so this one starts anew", file=sys.stderr)
        return
    device, parameters = state.prompts.text.device, dict(state.prompts.named_parameters())

    def part(start: str) -> dict[str, Tensor]:
        return {key.removeprefix(start): value.to(device) for key, value in tensors.items() if key.startswith(start)}

    state.prompts.load_state_dict(part("prompts."))
    state.history, state.best = about["history"], part("best.")
    for key, value in part("optimizer.").items():
        name, _, entry = key.partition(":")
        state.optimizer.state[parameters[name]][entry] = value.cpu() if value.ndim == 0 else value  # Adam's step count
