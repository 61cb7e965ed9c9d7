"""What a trial needs, worked out once: from its settings alone, and with model and data at hand.

Every rule of the kind "this trial fits nothing" or "a prior has no shape" stands here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import nn

from patchrank.config import PromptConfig, TrialConfig
from patchrank.data.image_split import ImageSplit
from patchrank.fit import predictor_shape
from patchrank.golden.make_shards import shard_folder
from patchrank.golden.shards import ShardFolder
from patchrank.layers.predictors import create_predictor
from patchrank.layers.reducers import REDUCERS
from patchrank.models.pruning_cfg import lets_leave
from patchrank.prompt.batches import load_train
from patchrank.prompt.presets import complete
from patchrank.trial.epochs import Steps
from patchrank.trial.inputs import Inputs, load_part


@dataclass(frozen=True)
class Ranker:
    """What a trial fits to golden scores: a predictor's name, and its own settings, of which a prior has none."""

    name: str
    shape: dict[str, object]

    def create(self, tower: nn.Module) -> nn.Module:
        """One for a tower that nobody has fitted, with random weights."""
        return create_predictor(self.name, tower.embed_dim, tower.patch_embed.grid_size, **self.shape)


@dataclass(frozen=True)
class ResolvedTrial:
    """A trial's settings, and all that follows from them without a model or data. Making one costs nothing."""

    config: TrialConfig

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are evaluated, over which results are means."""
        return self.config.data.tasks

    @property
    def fit_tasks(self) -> tuple[str, ...]:
        """The tasks whose images the ranking is fitted on; none where nothing is fitted."""
        if not self.is_fitted:
            return ()
        return self.tasks if self.fits_each_task else self.config.predictor.fit_on

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """All tasks that are read, each once."""
        repaired_on = [name for task in self.tasks for name in self.repaired_on(task)]
        return tuple(dict.fromkeys([*self.tasks, *self.fit_tasks, *repaired_on]))

    def fitted_on(self, task: str) -> tuple[str, ...]:
        """The tasks that the ranking of one task's images is fitted on."""
        if self.is_fitted and self.config.predictor.fit_on == "others":
            return tuple(other for other in self.tasks if other != task)
        return (task,) if self.fits_each_task else self.fit_tasks

    @property
    def repairs(self) -> bool:
        """Whether the pruned tower's projection is solved anew; where nothing leaves there is nothing to repair."""
        return self.config.repair is not None and self.prunes

    def repaired_on(self, task: str) -> tuple[str, ...]:
        """The tasks that the repair of one task's images is solved on: those of a predictor, whoever ranks."""
        if not self.repairs:
            return ()
        named = self.config.predictor.fit_on
        return (task,) if named == "own" else named

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a task's data that are evaluated; `n_test: 0` keeps test out of sight altogether."""
        if self.config.data.n_test == 0:
            return ("val",)
        return ("val", "oracle" if self.is_oracle else "test")

    @property
    def prunes(self) -> bool:
        """Whether the settings let any token leave."""
        return lets_leave(self.config.pruning)

    @property
    def pruning(self) -> dict[str, object]:
        """What `set_pruning` takes of this trial, beside a predictor."""
        return self.config.pruning.model_dump() | {"seed": self.config.seed}

    @property
    def location(self) -> int:
        """The first layer, from 1, before which tokens leave; a ranker reads its input."""
        return self.config.pruning.locations[0]

    @property
    def remove_at(self) -> int:
        """The layer before which golden windows leave."""
        return self.location if self.config.golden.remove_at == "first" else self.config.golden.remove_at

    @property
    def is_oracle(self) -> bool:
        """Whether images are ranked by golden scores of their own, which nobody could deploy."""
        return self.config.pruning.reducer == "golden"

    @property
    def can_be_timed(self) -> bool:
        """Whether its milliseconds mean anything: golden scores come from outside."""
        return not (self.is_oracle and self.prunes)

    @property
    def is_fitted(self) -> bool:
        """Whether the reducer ranks by something that is fitted to golden scores, even if nothing leaves."""
        return getattr(REDUCERS.get(self.config.pruning.reducer), "fitted", False)

    @property
    def fits_each_task(self) -> bool:
        """Whether each task gets a ranker of its own, instead of one for all."""
        return self.is_fitted and self.config.predictor.fit_on in ("own", "others")

    @property
    def ranker(self) -> Ranker | None:
        """What is fitted to golden scores; None where nothing is."""
        if not self.is_fitted:
            return None
        return self.predictor if self.ranks_by_predictor else Ranker("prior", {})

    @property
    def ranks_by_predictor(self) -> bool:
        """Whether what the reducer ranks by is the settings' predictor, and no prior."""
        return self.is_fitted and self.config.pruning.reducer != "prior"

    @property
    def predictor(self) -> Ranker:
        """The predictor of the settings, whether or not it ranks."""
        settings = self.config.predictor
        return Ranker(settings.name, predictor_shape(settings.name, settings.dim, settings.head))

    @property
    def fit_epochs(self) -> int:
        """How many epochs one fitting takes; a prior takes none."""
        return 0 if self.ranker is None or self.ranker.name == "prior" else self.config.predictor.epochs

    @property
    def learns(self) -> bool:
        """Whether prompts are tuned."""
        return self.config.prompt is not None and self.config.prompt.mode != "none"

    @property
    def learns_visual(self) -> bool:
        """Whether learned tokens go through the image tower, and not through the text tower alone."""
        return self.learns and "V" in self.config.prompt.mode

    @property
    def controls(self) -> tuple[str, ...]:
        """Other orders that test images are ranked in. Prompts are tuned for one order, so they exclude others."""
        return self.config.controls if self.ranks_by_predictor and not self.learns else ()

    @cached_property
    def needs(self) -> tuple[tuple[str, str], ...]:
        """Tasks, and parts of their data, whose golden scores are read: to fit to, to measure a ranking on, or to rank.

        Parts are `train`, `val`, `test` and `oracle`.
        """
        if self.is_oracle:
            return tuple((task, part) for task in self.tasks for part in self.parts)
        fitted = [(task, "train") for task in self.fit_tasks]
        return (*fitted, *((task, "val") for task in self.tasks if self.is_fitted))


@dataclass(frozen=True, eq=False)
class TrialContext:
    """A resolved trial at work: with its model and data, and with what only those can tell.

    trial, inputs: the trial, and model and data as `load_inputs` gave them for it.
    shards: folder or fsspec URL of golden shards, and of predictors and prompts.
    steps: who hears of each epoch of what is trained; None where nobody does.
    quiet: no progress bars.
    """

    trial: ResolvedTrial
    inputs: Inputs
    shards: str = ""
    steps: Steps | None = None
    quiet: bool = False

    @cached_property
    def needed_shards(self) -> dict[tuple[str, str], tuple[ImageSplit, ShardFolder]]:
        """The golden shards that the trial reads, made or not, with the images that they are of."""
        settings = self.trial.config.golden.model_dump() | {"remove_at": self.trial.remove_at}
        found = {}
        for need in self.trial.needs:
            split = self.inputs.split(*need)
            folder = shard_folder(self.inputs.clip, split, self.shards, sha256=self.inputs.sha256, **settings)
            found[need] = split, folder
        return found

    def path(self, task: str, part: str) -> str:
        """The folder of the golden shards of a part of a task's data."""
        return self.needed_shards[task, part][1].path

    @cached_property
    def recipes(self) -> dict[str, PromptConfig]:
        """How prompts are tuned, by task, with no setting left open; {} where none are.

        Raises:
            UserError: the model has no text tower.
        """
        if not self.trial.learns:
            return {}
        self.inputs.clip.check_text()
        return {task: complete(self.trial.config.prompt, self.inputs.clip, task) for task in self.trial.tasks}

    def lessons(self, task: str) -> ImageSplit:
        """The images that a task's prompts are tuned on."""
        recipe, data, seed = self.recipes[task], self.trial.config.data, self.trial.config.seed
        key = ("lessons", task, recipe.loss, recipe.shots, recipe.images, seed)
        return self.inputs.once(key, lambda: load_train(task, recipe, seed, data))

    def repair_images(self, task: str) -> list[ImageSplit]:
        """The images that the repair of a task is solved on: the first of each training split, as many of each task."""
        names, wanted = self.trial.repaired_on(task), self.trial.config.repair.images
        share, extra = divmod(wanted, len(names))
        counts = [share + (place < extra) for place in range(len(names))]
        return [
            self.inputs.once(
                ("repair", name, count),
                lambda name=name, count=count: load_part(name, "train", self.inputs.data, count),
            )
            for name, count in zip(names, counts)
        ]

    def num_steps(self, of: Literal["predictor", "prompt"]) -> int:
        """How many steps the trial reports if nothing that it trains is there already, or 0."""
        if of == "prompt":
            return sum(recipe.epochs for recipe in self.recipes.values())
        return self.trial.fit_epochs * (len(self.trial.tasks) if self.trial.fits_each_task else 1)

    def listener(self, of: Literal["predictor", "prompt"], before: int) -> Callable[[int, float], None] | None:
        """What takes epoch (from 1) and value of one training and tells them as a step; None if nobody listens.

        Args:
            of: what is trained.
            before: how many steps the trial has before this training.
        """
        steps = self.steps
        if steps is None or steps.of != of:
            return None
        return lambda epoch, value: steps.tell(before + epoch, value)
