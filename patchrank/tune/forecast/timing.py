"""A few timed steps of everything that a sweep spends its time on, on this machine: seconds by what is done.

Nothing is kept: predictors are random ones, and the pair is as it was afterwards. Every figure is measured once for
all trials that share what it depends on, and never for longer than a step takes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from patchrank.data.image_split import ImageSplit
from patchrank.evaluate import evaluate
from patchrank.fit import BATCH_SIZE as FIT_BATCH
from patchrank.fit import fit_predictor
from patchrank.golden.agreement import prior_of, rank_quality
from patchrank.golden.dataset import Ranked
from patchrank.golden.scores import batch_size_of, score_images
from patchrank.golden.shards import ShardFolder
from patchrank.layers.predictors import create_predictor
from patchrank.layers.pruning import windows
from patchrank.models.clip import Clip
from patchrank.prompt.__main__ import dry_run
from patchrank.prompt.presets import complete
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.utils.progress import progress

IMAGES = 32  # of a timed batch
FIT_STEPS = 4
QUICK = 1.0  # seconds; what takes less is timed again, since a first time pays for more than itself


class Timer:
    """Times steps, each kind once.

    Args:
        device: where trials are to run.
        quiet: no bar.
    """

    def __init__(self, device: str, quiet: bool):
        self.device = torch.device(device)
        self.known: dict[tuple, float] = {}
        self.bar = progress(desc="timing steps", unit="step", disable=quiet)

    def once(self, key: tuple, prepare: Callable[[], tuple[Callable[[], object], float]]) -> float:
        """Seconds of a step, divided by its share, measured for the first with this key; `prepare` gives both."""
        if key not in self.known:
            step, share = prepare()
            self.known[key] = self._time(step) / share
            self.bar.update()
        return self.known[key]

    def _time(self, step: Callable[[], object]) -> float:
        first = self._one(step)
        return first if first > QUICK else min(first, self._one(step))

    def _one(self, step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def load(self, clip: Clip, split: ImageSplit) -> float:
        """Reading, decoding and transforming one image."""
        few, transform = split.first(IMAGES), clip.transform()
        return self.once(
            ("load", clip.name, split.task), lambda: (lambda: list(few.batches(transform, IMAGES)), len(few))
        )

    def whole(self, clip: Clip, split: ImageSplit) -> float:
        """The unpruned tower on one image."""

        def prepare():
            images = self._images(clip, split.first(IMAGES))
            return lambda: _whole(clip, images), len(images)

        return self.once(("whole", clip.name), prepare)

    def score(self, clip: Clip, split: ImageSplit, folder: ShardFolder) -> float:
        """Golden scores of one decoded image."""
        how = {"metrics": tuple(folder.header["metrics"]), **folder.header["golden"]}

        def prepare():
            squares = len(windows(clip.visual.patch_embed.grid_size, how["window"], how["stride"]))
            few = split.first(max(1, batch_size_of(self.device.type) // squares))
            head = clip.zero_shot_head(few.classes, few.templates) if few.classes else None
            labels = None if few.labels is None else torch.tensor(few.labels, device=self.device)
            given = self._images(clip, few), head, labels, clip.logit_scale.exp().item()
            return lambda: score_images(clip.visual, *given, **how), len(few)

        return self.once(("score", clip.name, *how.values()), prepare)

    def evaluate(self, trial: ResolvedTrial, clip: Clip, split: ImageSplit, macs: int) -> float:
        """Pruned evaluation of one image of `macs`, its controls with it; by arithmetic, from the first of its kind."""

        def prepare():
            few, tower = split.first(IMAGES).loaded(clip.transform(), 1 << 30), clip.visual
            scores = (
                torch.rand(len(few), tower.num_patches).numpy() if trial.config.pruning.reducer == "golden" else None
            )
            with torch.inference_mode():
                tokens = tower.forward_prefix(few.tensors.to(self.device), tower.shared_layer)
                unpruned = tower.forward_whole(few.tensors.to(self.device))
            given = {"unpruned": unpruned, "tokens": tokens, "quiet": True}
            return lambda: evaluate(clip, few, trial.config.controls, scores, **given), len(few) * macs

        pruning = trial.config.pruning
        return macs * self.once(
            ("evaluate", clip.name, pruning.reducer, pruning.leftovers, tuple(trial.config.controls)), prepare
        )

    def fit(self, trial: ResolvedTrial, clip: Clip, images: int) -> float:
        """Fitting one predictor to so many images."""
        if trial.config.pruning.reducer == "prior" or trial.config.predictor.name == "prior":
            return 0.0
        rows, grid = min(FIT_BATCH, images), clip.visual.patch_embed.grid_size
        how = {"name": trial.config.predictor.name, "loss": trial.config.predictor.loss, **trial.predictor.shape}

        def prepare():
            data = self._ranked(clip, rows)
            return lambda: fit_predictor(data, grid, epochs=FIT_STEPS, quiet=True, **how), FIT_STEPS

        steps = trial.config.predictor.epochs * -(-images // FIT_BATCH)
        return steps * self.once(("fit", clip.name, rows, *how.values()), prepare)

    def quality(self, trial: ResolvedTrial, clip: Clip) -> float:
        """Comparing the ranking of one image with the golden one."""

        def prepare():
            predictor, data = random_predictor(trial, clip), self._ranked(clip, IMAGES)
            return lambda: rank_quality(predictor, prior_of(data), data), IMAGES

        return self.once(("quality", clip.name, trial.config.predictor.name), prepare)

    def tune(self, trial: ResolvedTrial, task: str, inputs: Inputs) -> float:
        """Tuning the prompts of one trial and task, with its pruning in force: as `patchrank.prompt --dry-run` says."""
        config, train = complete(trial.config.prompt, inputs.clip, task), TrialContext(trial, inputs).lessons(task)
        drops = inputs.clip.visual.drop_counts
        key = "tune", inputs.clip.name, config.model_dump_json(exclude={"epochs", "lr", "shots", "images"}), drops
        if key not in self.known:
            self.known[key] = dry_run(inputs.clip, train, config, trial.config.seed)["seconds_per_step"]
            self.bar.update()
        return self.known[key] * config.epochs * max(1, len(train) // config.batch_size)

    def start(self) -> float:
        """Starting a worker: all that it imports."""
        command = [sys.executable, "-c", "import patchrank.tune.worker"]
        if ("start",) not in self.known:
            self.known["start",] = self._one(lambda: subprocess.run(command, check=True, capture_output=True))
            self.bar.update()
        return self.known["start",]

    def _images(self, clip: Clip, few: ImageSplit) -> torch.Tensor:
        return torch.cat([images for images, _ in few.batches(clip.transform(), IMAGES)]).to(self.device)

    def _ranked(self, clip: Clip, rows: int) -> Ranked:
        """Tokens and golden scores of images that there are none of."""
        draw = torch.Generator().manual_seed(0)
        shapes = (rows, clip.visual.embed_dim), (rows, clip.visual.num_patches, clip.visual.embed_dim)
        parts = [torch.randn(shape, generator=draw) for shape in (*shapes, (rows, clip.visual.num_patches))]
        return Ranked(*(part.to(self.device) for part in parts))


def random_predictor(trial: ResolvedTrial, clip: Clip) -> torch.nn.Module:
    """A predictor of a trial's kind that nobody has fitted."""
    name = "prior" if trial.config.pruning.reducer == "prior" else trial.config.predictor.name
    shape = {} if name == "prior" else trial.predictor.shape
    made = create_predictor(name, clip.visual.embed_dim, clip.visual.patch_embed.grid_size, **shape)
    return made.to(clip.logit_scale.device).eval()


@contextmanager
def pruned(trial: ResolvedTrial, clip: Clip) -> Iterator[None]:
    """The pair with the pruning of a trial, by a random predictor, for the length of a block."""
    settings = trial.config.pruning.model_dump() | {"seed": trial.config.seed}
    predictor = {"predictor": random_predictor(trial, clip)} if trial.is_fitted else {}
    clip.visual.set_pruning(keep_rate=1.0, drop_counts=None)
    try:
        clip.visual.set_pruning(**settings, **predictor)
        yield
    finally:
        clip.visual.set_pruning(keep_rate=1.0, drop_counts=None)


@contextmanager
def prepared(clip: Clip, device: str, threads: int) -> Iterator[None]:
    """The pair on a device, and torch on so many threads, for the length of a block."""
    before, place = torch.get_num_threads(), clip.logit_scale.device
    torch.set_num_threads(threads)
    try:
        clip.to(device)
        yield
    finally:
        clip.to(place)
        torch.set_num_threads(before)


@torch.inference_mode()
def _whole(clip: Clip, images: torch.Tensor) -> torch.Tensor:
    return clip.visual.forward_whole(images)
