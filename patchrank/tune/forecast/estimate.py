"""What a sweep will take: forwards, arithmetic, bytes and, from a few timed steps, seconds (`--dry-run`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from patchrank.layers.pruning import windows
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.tune.forecast.counting import TAR_END, prefix_macs, record_bytes, sample_bytes, score_macs
from patchrank.tune.forecast.timing import Timer, prepared, pruned
from patchrank.tune.ray_tasks import Job

RAY = 18.0  # seconds that Ray, Tune and the report take by themselves; measured on 2 cores


@dataclass(frozen=True)
class Cost:
    """What one half of a sweep takes: `count` shards or trials; seconds by one worker, one after the other."""

    count: int = 0
    images: int = 0
    forwards: int = 0
    macs: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Estimate:
    """Shards and trials that are to be made; `starting` is what Ray and its workers take to start, in seconds."""

    shards: Cost
    trials: Cost
    starting: float
    slots: int
    device: str
    threads: int

    @property
    def seconds(self) -> float:
        """Until all is done, if `slots` trials run at a time."""
        return self.starting + (self.shards.seconds + self.trials.seconds) / self.slots

    def lines(self) -> list[str]:
        """What `--dry-run` prints."""
        return [
            f"golden shards: {self.shards.count:,} to make of {self.shards.images:,} images, "
            f"{self.shards.forwards:,} forwards of windows, {_macs(self.shards.macs)}, "
            f"{_bytes(self.shards.num_bytes)}, about {_time(self.shards.seconds / self.slots)}",
            f"trials: {self.trials.count:,} to run, {self.trials.forwards:,} forwards of images, "
            f"{_macs(self.trials.macs)} without fitting and tuning, records of {_bytes(self.trials.num_bytes)}, "
            f"about {_time(self.trials.seconds / self.slots)}",
            f"in all about {_time(self.seconds)}, {_time(self.starting)} of it to start Ray and its workers",
            f"  from a few steps timed on this machine's {self.device} with {self.threads} "
            f"thread{'s' * (self.threads > 1)}, one at a time, for {self.slots} at a time: other nodes, and steps that "
            "get in each other's way, will differ; predictors and prompts count as not fitted yet",
        ]


class _Part(NamedTuple):
    """Something that a trial does: each time, or once a worker (`worker`), or once for all (`sweep`), by its key."""

    key: tuple
    scope: Literal["trial", "worker", "sweep"]
    seconds: float
    forwards: int = 0
    macs: int = 0


def estimate(
    jobs: Sequence[Job],
    trials: Sequence[ResolvedTrial],
    inputs: Callable[[ResolvedTrial], Inputs],
    slots: int = 1,
    cpu: float = 1,
    device: str = "cpu",
    quiet: bool = False,
) -> Estimate:
    """Counts what is to be done and times a few steps of it; writes nothing.

    Args:
        jobs: sets of shards, of which those with faults are to be made.
        trials: those without a record; of a sampled sweep as many draws.
        inputs: gives model and data of a trial.
        slots: trials that run at a time.
        cpu: of one trial, as `resources.cpu`; its whole part is how many threads torch gets.
        device: `cpu` or `cuda`, where trials run.
    """
    threads, timer = max(1, int(cpu)), Timer(device, quiet)
    clips = {id(each.clip): each.clip for each in map(inputs, [*(job.trial for job in jobs), *trials])}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        for clip in clips.values():
            stack.enter_context(prepared(clip, device, threads))
        shards = sum((_shards(job, inputs(job.trial), timer) for job in jobs if job.faults), Cost())
        found = _trials(trials, inputs, timer, min(slots, len(trials)))
        starting = timer.start() * (2 + bool(shards.count)) + RAY if trials else 0.0
        timer.bar.close()
    return Estimate(shards, found, starting, max(1, slots), device, threads)


def _shards(job: Job, inputs: Inputs, timer: Timer) -> Cost:
    """One set of shards, as far as it is not there."""
    golden, metrics, tower = job.folder.header["golden"], job.folder.header["metrics"], inputs.clip.visual
    split = next(
        split
        for split, folder in TrialContext(job.trial, inputs).needed_shards.values()
        if folder.key == job.folder.key
    )
    images = sum(job.folder.sizes[index] for index in job.faults)
    squares = len(windows(tower.patch_embed.grid_size, golden["window"], golden["stride"]))
    each = timer.load(inputs.clip, split) + timer.score(inputs.clip, split, job.folder)
    passes = squares * (1 + (golden["rounds"] - 1) * len(metrics))
    arrays = [4 * len(metrics) * tower.num_patches, 4 * len(metrics) * squares]
    macs = score_macs(tower, squares, **{key: golden[key] for key in ("window", "remove_at", "rounds")})
    size = images * sample_bytes(split, arrays) + len(job.faults) * TAR_END
    return Cost(len(job.faults), images, images * passes, images * macs, size, images * each)


def _trials(
    trials: Sequence[ResolvedTrial], inputs: Callable[[ResolvedTrial], Inputs], timer: Timer, workers: int
) -> Cost:
    """All trials; what several share counts once, or once for each worker that meets it."""
    shared: dict[tuple, list[_Part]] = defaultdict(list)
    sizes: dict[str, int] = {}
    total = Cost()
    for n, trial in enumerate(trials):
        some, data = inputs(trial), trial.config.data.model_dump_json()
        sizes[data] = sizes.get(data) or record_bytes(trial, some)
        total += Cost(1, num_bytes=sizes[data])
        with pruned(trial, some.clip):
            for part in _parts(trial, some, timer):
                shared[(n,) if part.scope == "trial" else part.key].append(part)
    for parts in shared.values():
        times = {"trial": len(parts), "worker": min(workers, len(parts)), "sweep": 1}[parts[0].scope]
        for part in parts[:times]:
            total += Cost(forwards=part.forwards, macs=part.macs, seconds=part.seconds)
    return total


def _parts(trial: ResolvedTrial, inputs: Inputs, timer: Timer) -> Iterator[_Part]:
    """What one trial does, with its pruning in force."""
    folders = {need: folder.key for need, (_, folder) in TrialContext(trial, inputs).needed_shards.items()}
    data = trial.config.model.model_dump_json(), trial.config.data.model_dump_json()
    ranker = ()
    if trial.is_fitted:
        trained = tuple(folders[task, "train"] for task in trial.fit_tasks)
        settings = (
            trial.config.predictor.model_dump_json(),
            trial.config.golden.metric,
            trial.config.pruning.locations[0],
            trial.config.seed,
        )
        ranker = trial.config.pruning.reducer, *settings
        if trial.config.predictor.fit_on != "own":
            yield _fit(trial, inputs, timer, ranker + trained, trial.fit_tasks)
    for task in trial.config.data.tasks:
        for part in ("val", "test"):
            yield from _references(trial, inputs, timer, data, task, part)
        if trial.is_fitted:
            yield from _ranking(trial, inputs, timer, folders, ranker, task)
        if trial.learns:
            settings = trial.config.prompt.model_dump_json(), trial.config.pruning.model_dump_json(), trial.config.seed
            yield _Part(("tune", data, ranker, task, *settings), "sweep", timer.tune(trial, task, inputs))
        yield _evaluation(trial, inputs, timer, task)


def _fit(trial: ResolvedTrial, inputs: Inputs, timer: Timer, key: tuple, tasks: Sequence[str]) -> _Part:
    images = sum(len(inputs.split(task, "train")) for task in tasks)
    return _Part(("fit", *key), "sweep", timer.fit(trial, inputs.clip, images))


def _references(
    trial: ResolvedTrial, inputs: Inputs, timer: Timer, data: tuple, task: str, part: str
) -> Iterator[_Part]:
    """Images of a part of a task in memory, whole embeddings, and tokens that pruning does not touch."""
    clip, split = inputs.clip, inputs.split(task, part)
    count, layer, whole = len(split), clip.visual.shared_layer, clip.visual.macs_unpruned().image
    if not count:
        return
    seconds = timer.whole(clip, split)
    once = count * (timer.load(clip, split) + seconds)
    yield _Part(("load", *data, task, part), "worker", once, count, count * whole)
    if not trial.learns:
        macs = prefix_macs(clip.visual, layer)
        yield _Part(("tokens", *data, task, part, layer), "worker", count * seconds * macs / whole, 0, count * macs)


def _ranking(
    trial: ResolvedTrial, inputs: Inputs, timer: Timer, folders: dict, ranker: tuple, task: str
) -> Iterator[_Part]:
    """Tokens of the images that were scored, a predictor fitted to them, and how well it ranks."""
    clip, location = inputs.clip, trial.config.pruning.locations[0]
    own = [task] if trial.config.predictor.fit_on == "own" else trial.fit_tasks
    share = prefix_macs(clip.visual, location) / clip.visual.macs_unpruned().image
    for need in [*((name, "train") for name in own), (task, "val")]:
        split = inputs.split(*need)
        each = timer.load(clip, split) + share * timer.whole(clip, split)
        yield _Part(("ranked", folders[need], location), "worker", len(split) * each)
    key = *ranker, *(folders[name, "train"] for name in own)
    if trial.config.predictor.fit_on == "own":
        yield _fit(trial, inputs, timer, key, own)
    val = len(inputs.split(task, "val"))
    yield _Part(("quality", *key, folders[task, "val"]), "worker", val * timer.quality(trial, clip))


def _evaluation(trial: ResolvedTrial, inputs: Inputs, timer: Timer, task: str) -> _Part:
    """val and test by the pruning in force, and by the controls' orders."""
    clip, tower = inputs.clip, inputs.clip.visual
    parts = "val", "oracle" if trial.config.pruning.reducer == "golden" else "test"
    counts = [len(inputs.split(task, part)) for part in parts]
    macs = tower.macs().image - prefix_macs(tower, tower.shared_layer)
    each = timer.evaluate(trial, clip, inputs.split(task, "val"), macs)
    if trial.learns:  # whose tokens no other trial shares
        each *= tower.macs().image / macs
    passes = sum(counts) + counts[1] * len(trial.config.controls)
    return _Part((), "trial", sum(counts) * each, passes, passes * macs)


def _macs(count: int) -> str:
    return _scaled(count, 1000, ("MACs", "kMACs", "MMACs", "GMACs", "TMACs", "PMACs", "EMACs"))


def _bytes(count: int) -> str:
    return _scaled(count, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < step:
            return f"{value:.3g} {unit}"
        value /= step
    return f"{value:.3g} {units[-1]}"


def _time(seconds: float) -> str:
    """`42 s`, `7 min`, `3.2 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
