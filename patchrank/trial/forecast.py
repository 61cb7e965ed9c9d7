"""How much work trials are, counted, and about how long it takes, from one batch that is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from patchrank.benchmark import seconds_of
from patchrank.golden.shards import ShardFolder
from patchrank.golden.suffix import shares_qkv
from patchrank.layers.class_token import is_plain
from patchrank.layers.macs import block_macs, text_macs, vision_macs
from patchrank.layers.pruning import windows
from patchrank.models.text import text_shape
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import PICTURES

TRAINING = 3  # forwards that a step of training costs: its own, and a backward pass that costs about two
TIMED_IMAGES, TIMED_MACS, TURNS = 32, 2e9, 5  # of the timed batch, at most, and how often it is timed
MEMBERS, MEMBER = 5, 768  # files of an image in a shard, and bytes that a tar adds to each


@dataclass
class Work:
    """Work that is counted. `forwards` are images that go through a tower, or through some of its layers."""

    forwards: int = 0
    macs: int = 0
    images_read: int = 0
    num_bytes: float = 0.0
    _counted: set[Hashable] = field(default_factory=set, compare=False)

    def add(self, images: int, macs: int, read: bool = False, once: Hashable = None) -> None:
        """Adds images of so many MACs each; what `once` names counts the first time alone."""
        if once is None or once not in self._counted:
            self._counted.add(once)
            self.forwards += images
            self.macs += images * macs
            self.images_read += images if read else 0

    def told(self, what: str) -> str:
        """The counts in words; `what` goes forward."""
        size = f"{self.macs / 1e9:,.0f} GMACs, {self.num_bytes / 2**20:,.1f} MiB"
        return f"{self.forwards:,} forwards of {what}, {size}"


def count_shards(folder: ShardFolder, faults: Collection[int], context: TrialContext, work: Work) -> None:
    """Counts the shards `faults` of a folder: every image whole, and without each of its windows."""
    header, tower = folder.header, context.inputs.clip.visual
    golden, patches, metrics = header["golden"], tower.num_patches, len(header["metrics"])
    images = sum(folder.sizes[index] for index in faults)
    squares = len(windows(tower.patch_embed.grid_size, golden["window"], golden["stride"]))
    work.add(images, vision_macs(tower, cls_only_last=is_plain(tower.blocks[-1])), read=True)
    shared = 3 * tower.embed_dim**2 if shares_qkv(tower, golden["remove_at"]) else 0  # of a token, once an image
    for n in range(golden["rounds"]):
        alive = patches - n * (patches // golden["rounds"])
        length = tower.num_leading_tokens + round(alive * (1 - golden["window"] ** 2 / patches))
        searches = 1 if n == 0 else metrics
        work.add(images * squares * searches, suffix_macs(tower, length, golden["remove_at"]) - shared * length)
    split = next(split for split, other in context.needed_shards.values() if other.key == folder.key)
    content = [len(split.content(n)) for n in range(min(8, len(split)))]
    arrays = 4 * metrics * (patches + squares)
    work.num_bytes += images * (sum(content) / len(content) + arrays + MEMBERS * MEMBER)


def count_trial(context: TrialContext, worker: int, work: Work) -> None:
    """Counts one trial. What a worker keeps for its next trial counts once a worker, what all share once in all."""
    trial, inputs, data = context.trial, context.inputs, (context.trial.config.model, context.trial.config.data)
    tower = inputs.clip.visual
    with torch.random.fork_rng(devices=[]):
        predictor = None if trial.ranker is None else trial.ranker.create(tower)
    with inputs.clip.applied(predictor=predictor, **trial.pruning):
        layer, macs = tower.shared_layer, tower.macs()
    whole, pruned = tower.macs_unpruned().image, macs.image
    shared = prefix_macs(tower, layer)
    if trial.is_fitted:
        _count_fitting(context, worker, macs.predictor, work)
    for task in trial.tasks:
        for part in trial.parts:
            seen, source = len(inputs.split(task, part)), "test" if part == "oracle" else part
            references = len(inputs.split(task, source))
            work.add(references, whole, True, (worker, data, task, source))
            if not trial.learns:
                work.add(references, shared, once=(worker, data, task, source, layer))
            if not inputs.clip.has_text and inputs.split(task, part).labels is not None:
                work.add(len(inputs.split(task, "train")), whole, True, (worker, data, task, "train"))
            orders = 1 + (len(trial.controls) if part == "test" else 0)
            work.add(seen * orders, pruned if trial.learns else pruned - shared)
            work.num_bytes += 10 * seen
        if trial.learns:
            _count_tuning(context, task, pruned, work)
        if trial.repairs:  # a repair is kept for whoever asks next
            work.add(
                sum(map(len, context.repair_images(task))), whole + pruned, read=True, once=_repair_key(trial, task)
            )
    side = tower.pretrained_cfg["input_size"][-1]
    work.num_bytes += 2500 + 2 * PICTURES * side**2  # a record without its arrays, and pictures, which compress


def _repair_key(trial: ResolvedTrial, task: str) -> tuple:
    """What decides on a repair."""
    config = trial.config
    ranking = (config.predictor, config.golden, config.seed) if trial.is_fitted else ()
    return "repair", config.model, config.data, trial.repaired_on(task), config.pruning, config.repair, ranking


def _count_fitting(context: TrialContext, worker: int, ranking: int, work: Work) -> None:
    """Counts the shards that a trial reads, and the fitting of its rankers."""
    trial, inputs, config = context.trial, context.inputs, context.trial.config
    for split, folder in context.needed_shards.values():
        macs = prefix_macs(inputs.clip.visual, trial.location)
        work.add(len(split), macs, True, (worker, folder.key, trial.location))
    for tasks in {trial.fitted_on(task) for task in trial.tasks}:
        images = sum(len(inputs.split(name, "train")) for name in tasks)
        key = tasks, config.model, config.data, config.golden, config.predictor, trial.ranker.name
        work.add(images * trial.fit_epochs, TRAINING * ranking, once=(*key, trial.location, config.seed))


def _count_tuning(context: TrialContext, task: str, pruned: int, work: Work) -> None:
    """Counts the tuning of one task's prompts: images, unless they are embedded once, and class texts."""
    recipe, train, clip = context.recipes[task], context.lessons(task), context.inputs.clip
    steps = recipe.epochs * max(1, len(train) // recipe.batch_size)
    passes = TRAINING if "V" in recipe.mode else 1 if recipe.augment else 0
    work.add(steps * min(len(train), recipe.batch_size) * passes, pruned)
    if "T" in recipe.mode:
        work.add(steps * len(train.classes), TRAINING * text_macs(*text_shape(clip.text)))


def suffix_macs(tower: nn.Module, length: int, layer: int) -> int:
    """MACs of a sequence of so many tokens from `layer` (1 to depth) to its embedding."""
    depth, hidden, skips = len(tower.blocks), tower.blocks[0].mlp.fc1.out_features, is_plain(tower.blocks[-1])
    blocks = (block_macs(length, tower.embed_dim, hidden, skips and n == depth) for n in range(layer, depth + 1))
    return sum(blocks) + tower.embed_dim * tower.num_classes


def prefix_macs(tower: nn.Module, layer: int) -> int:
    """MACs of a whole image up to the input of `layer`."""
    length = tower.num_patches + tower.num_leading_tokens
    return vision_macs(tower, cls_only_last=is_plain(tower.blocks[-1])) - suffix_macs(tower, length, layer)


@torch.inference_mode()
def time_batch(context: TrialContext, device: str, num_threads: int) -> tuple[float, float]:
    """Seconds of a MAC and of reading an image, from a batch that goes through the unpruned tower.

    On a CPU these are seconds of computing, so that other programs that run at the time do not count.
    """
    clip, before = context.inputs.clip.to(device), torch.get_num_threads()
    macs = clip.visual.macs_unpruned().image
    split = context.inputs.split(context.trial.tasks[0], "val").first(max(1, min(TIMED_IMAGES, int(TIMED_MACS / macs))))
    clock = time.process_time if device == "cpu" else time.perf_counter

    def read(_: torch.Tensor) -> torch.Tensor:
        return torch.cat([batch for batch, _ in split.batches(clip.transform(), len(split))])

    def seconds_an_image(run: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return median(seconds_of(run, images, clock) for _ in range(TURNS)) / len(split)

    images = read(torch.empty(0)).to(device)
    torch.set_num_threads(num_threads)
    try:
        clip.visual.forward_whole(images)  # the first run is slower
        forward, reading = seconds_an_image(clip.visual.forward_whole), seconds_an_image(read)
    finally:
        torch.set_num_threads(before)
    return forward / macs / (num_threads if device == "cpu" else 1), reading
