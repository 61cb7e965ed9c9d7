"""What `--dry-run` prints: how much work a sweep is, counted, and about how long it takes, from one measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from patchrank.benchmark import WARM_UP, seconds_of
from patchrank.config import Resources
from patchrank.golden.suffix import shares_qkv
from patchrank.layers.class_token import is_plain
from patchrank.layers.macs import block_macs, text_macs, vision_macs
from patchrank.layers.pruning import windows
from patchrank.models.text import text_shape
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import PICTURES
from patchrank.tune.cluster import Where, own_machine, slots
from patchrank.tune.console import say
from patchrank.tune.plan import Job, Plan
from patchrank.tune.space import random_points

START = 30.0  # seconds that Ray, the imports of its workers and the report take; measured on 2 cores
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


def print_estimate(plan: Plan, jobs: list[Job], fresh: bool, where: Where) -> None:
    """Prints what is to be done and about how long it takes. Writes nothing and starts no Ray.

    A cluster is not asked how large it is: its trials count as if they ran one at a time on this machine.
    """
    trials = _to_run(plan, fresh)
    if not trials:
        return
    resources, benchmark = plan.sweep.config.resources, plan.sweep.config.benchmark
    workers = 1 if where.address else min(slots(resources, {"this machine": own_machine()}), len(trials))
    scoring, running = Work(), Work()
    for job in jobs:
        count_shards(job, plan.context(job.trial), scoring)
    for n, trial in enumerate(trials):
        count_trial(plan.context(trial), n % workers, running)
    towers = [] if plan.speeds is None else plan.speeds.lacking(trials)
    turns = 2 * benchmark.batch_size * (benchmark.repeats + WARM_UP)  # with the unpruned twin, one after the other
    timing = sum(turns * plan.inputs(trial).clip.visual.macs_unpruned().image for trial in towers)
    say(f"  golden shards: {sum(len(job.faults) for job in jobs):,} to make, {scoring.told('windows')}")
    say(f"  trials: {len(trials):,} to run, {running.told('images')}")
    if towers:
        say(f"  milliseconds: {len(towers):,} towers to measure, {turns * len(towers):,} forwards of images")
    per_mac, per_image, device = _measure(plan.context(trials[0]), resources)
    macs = (scoring.macs + running.macs) / workers + timing
    seconds = START + macs * per_mac + (scoring.images_read + running.images_read) / workers * per_image
    say(
        f"  in all about {seconds / 60:.1f} min with {workers} trials at a time on this machine: an estimate by MACs, "
        f"from one batch that was timed ({device}). It may take half as long, or twice as long"
    )


def _to_run(plan: Plan, fresh: bool) -> list[ResolvedTrial]:
    """Trials that have no record; of a search, whose trials nobody knows beforehand, as many at random."""
    config, points = plan.sweep.config, []
    for cell in plan.cells:
        left = cell.samples - (0 if fresh else len(list(plan.records_of(cell))))
        if left > 0 and plan.sampled:
            search = config.search.model_copy(update={"samples": left})
            points += random_points(cell.values, cell.sampled, config.model_copy(update={"search": search}))
        elif left > 0:
            points.append(cell.values)
    return [plan.trial(point) for point in points]


def count_shards(job: Job, context: TrialContext, work: Work) -> None:
    """Counts the shards of a job that are not there: every image whole, and without each of its windows."""
    header, tower = job.folder.header, context.inputs.clip.visual
    golden, patches, metrics = header["golden"], tower.num_patches, len(header["metrics"])
    images = sum(job.folder.sizes[index] for index in job.faults)
    squares = len(windows(tower.patch_embed.grid_size, golden["window"], golden["stride"]))
    work.add(images, vision_macs(tower, cls_only_last=is_plain(tower.blocks[-1])), read=True)
    shared = 3 * tower.embed_dim**2 if shares_qkv(tower, golden["remove_at"]) else 0  # of a token, once an image
    for n in range(golden["rounds"]):
        alive = patches - n * (patches // golden["rounds"])
        length = tower.num_leading_tokens + round(alive * (1 - golden["window"] ** 2 / patches))
        searches = 1 if n == 0 else metrics
        work.add(images * squares * searches, suffix_macs(tower, length, golden["remove_at"]) - shared * length)
    split = next(split for split, folder in context.needed_shards.values() if folder.key == job.folder.key)
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
def _measure(context: TrialContext, resources: Resources) -> tuple[float, float, str]:
    """Seconds of a MAC and of reading an image, from a batch that goes through the unpruned tower, and the device.

    On a CPU these are seconds of computing, so that other programs that run at the time do not count.
    """
    device = "cuda" if resources.gpu and torch.cuda.is_available() else "cpu"
    clip, before = context.inputs.clip.to(device), torch.get_num_threads()
    macs = clip.visual.macs_unpruned().image
    split = context.inputs.split(context.trial.tasks[0], "val").first(max(1, min(TIMED_IMAGES, int(TIMED_MACS / macs))))
    clock = time.process_time if device == "cpu" else time.perf_counter

    def read(_: torch.Tensor) -> torch.Tensor:
        return torch.cat([batch for batch, _ in split.batches(clip.transform(), len(split))])

    def seconds_an_image(run: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return median(seconds_of(run, images, clock) for _ in range(TURNS)) / len(split)

    images = read(torch.empty(0)).to(device)
    torch.set_num_threads(resources.num_threads)
    try:
        clip.visual.forward_whole(images)  # the first run is slower
        forward, reading = seconds_an_image(clip.visual.forward_whole), seconds_an_image(read)
    finally:
        torch.set_num_threads(before)
    return forward / macs / (resources.num_threads if device == "cpu" else 1), reading, device
