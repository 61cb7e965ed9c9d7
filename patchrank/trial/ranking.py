"""The ranking of a trial: fitted on the spot, or read from where an earlier trial left it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from patchrank import fit
from patchrank.config import TrialConfig
from patchrank.golden.agreement import matching_on, prior_of, rank_quality
from patchrank.golden.dataset import Ranked, pooled
from patchrank.io import content_id, join
from patchrank.layers.predictors import load_predictor, save_predictor
from patchrank.layers.reducers import REDUCERS
from patchrank.models.clip import Clip
from patchrank.trial.epochs import Steps, listener
from patchrank.trial.inputs import Inputs
from patchrank.utils.errors import StoreError, UserError


def is_fitted(trial: TrialConfig) -> bool:
    """Whether the trial's reducer ranks by something that is fitted to golden scores."""
    return getattr(REDUCERS.get(trial.pruning.reducer), "fitted", False)


def fit_tasks(trial: TrialConfig) -> list[str]:
    """The tasks whose images the ranking of a trial is fitted on; none for one that is not fitted."""
    if not is_fitted(trial):
        return []
    return trial.data.tasks if trial.predictor.fit_on == "own" else trial.predictor.fit_on


def predictor_shape(trial: TrialConfig) -> dict:
    return fit.predictor_shape(trial.predictor.name, trial.predictor.dim, trial.predictor.head)


def num_epochs(trial: TrialConfig) -> int:
    """How many epochs of fitting a trial has in all, if it finds no predictor that is fitted already."""
    if not is_fitted(trial) or "prior" in (trial.pruning.reducer, trial.predictor.name):
        return 0
    return trial.predictor.epochs * (len(trial.data.tasks) if trial.predictor.fit_on == "own" else 1)


def rank(
    trial: TrialConfig,
    task: str,
    inputs: Inputs,
    paths: Mapping[tuple[str, str], str],
    shards: str,
    quiet: bool,
    steps: Steps | None = None,
) -> dict[str, np.ndarray]:
    """Sets the pruning of the trial on the tower; what is fitted is fitted first, and its ranking is measured.

    Args:
        paths: folders of golden-rank shards by task and part of its data.
    """
    visual, settings = inputs.clip.visual, trial.pruning.model_dump()
    visual.set_pruning(keep_rate=1.0, drop_counts=None)
    if not is_fitted(trial):
        visual.set_pruning(seed=trial.seed, **settings)
        return {}
    own = [task] if trial.predictor.fit_on == "own" else trial.predictor.fit_on
    metric, location = trial.golden.metric, trial.pruning.locations[0]

    def read(task: str, part: str) -> Ranked:
        return inputs.ranked(paths[task, part], metric, location, quiet)

    train = pooled([read(name, "train") for name in own])
    name = ranker_id(trial, [paths[name, "train"].rsplit("/", 1)[-1] for name in own])
    path = join(shards, "predictors", f"{name}.safetensors")
    predictor = _fitted(trial, inputs.clip, train, path, quiet, _watch(trial, task, read, steps))
    visual.set_pruning(predictor=predictor, seed=trial.seed, **settings)
    val = read(task, "val")
    return inputs.once((name, paths[task, "val"]), lambda: rank_quality(predictor, prior_of(train), val))


def _watch(
    trial: TrialConfig, task: str, read: Callable[[str, str], Ranked], steps: Steps | None
) -> Callable[[int, nn.Module], None] | None:
    """What hears of each epoch of fitting: matching on val, of all tasks that the predictor is for."""
    is_own = trial.predictor.fit_on == "own"
    hear = listener(steps, "predictor", trial.predictor.epochs * trial.data.tasks.index(task) if is_own else 0)
    if hear is None:
        return None
    tasks = [task] if is_own else trial.data.tasks
    return lambda epoch, predictor: hear(
        epoch, float(np.mean([matching_on(predictor, read(name, "val")) for name in tasks]))
    )


def ranker_id(trial: TrialConfig, shards: Sequence[str]) -> str:
    """Names what a trial fits by all that it depends on."""
    settings = trial.predictor.model_dump(exclude={"fit_on"}) | {"seed": trial.seed}
    settings = {"name": "prior"} if trial.pruning.reducer == "prior" else settings
    what = [shards, trial.golden.metric, trial.pruning.locations[0], settings, fit.VERSION]
    return content_id(what)[:16]


def _fitted(
    trial: TrialConfig,
    clip: Clip,
    train: Ranked,
    path: str,
    quiet: bool,
    after_epoch: Callable[[int, nn.Module], None] | None,
) -> nn.Module:
    """The ranker of a trial, from the cache if one was fitted to the same shards in the same way."""
    grid, location = clip.visual.patch_embed.grid_size, trial.pruning.locations[0]
    if trial.pruning.reducer == "prior":
        return fit.fit_predictor(train, grid, "prior")
    cached = _cached(path)
    if cached is not None:
        return cached.to(clip.logit_scale.device)
    settings = trial.predictor.model_dump()
    how = {name: settings[name] for name in ("name", "loss", "epochs", "lr")} | {"seed": trial.seed, "quiet": quiet}
    predictor = fit.fit_predictor(train, grid, **how, **predictor_shape(trial), after_epoch=after_epoch)
    about = fit.describe(clip, settings["name"], location, trial.golden.metric, **predictor_shape(trial))
    save_predictor(predictor, path, about)
    return predictor


def _cached(path: str) -> nn.Module | None:
    try:
        return load_predictor(path)[0]
    except StoreError:  # it may well be there
        raise
    except UserError:
        return None
