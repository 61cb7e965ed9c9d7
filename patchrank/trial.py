"""One configuration in, one result row out.

A trial makes what it needs (shards, predictor) if it is not there, without Ray, and writes its own record: whoever
runs it may be killed at any moment and loses nothing that was finished.
"""

from __future__ import annotations

import datetime
import io
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageOps

import patchrank
from patchrank import evaluate as evaluation
from patchrank import fit, golden
from patchrank.config import TrialConfig
from patchrank.data.images import ImageSplit
from patchrank.data.shards import ShardFolder
from patchrank.errors import StoreError, UserError
from patchrank.files import content_id, join, remove, write_atomic, write_json
from patchrank.inputs import Inputs, mean_over
from patchrank.layers.predictors import load_predictor, save_predictor
from patchrank.layers.reducers import REDUCERS
from patchrank.models.clip import Clip
from patchrank.prompting import tuning
from patchrank.tuned import Learned, learns, lessons_id, prompted

SCHEMA = 1
VERSIONS = {"golden": golden.VERSION, "fit": fit.VERSION, "evaluate": evaluation.VERSION}
PICTURES = 6  # test images, over all tasks, whose surviving tokens a report can draw


class Need(NamedTuple):
    """A task, and the part of its data that golden scores are needed of."""

    task: str
    part: str


def remove_at(trial: TrialConfig) -> int:
    """The layer before which golden windows leave."""
    return trial.pruning.locations[0] if trial.golden.remove_at == "first" else trial.golden.remove_at


def trial_id(trial: TrialConfig, fingerprint: dict) -> str:
    """Names a trial by all that its result depends on."""
    settings = trial.model_dump(exclude={"model": {"checkpoint"}, "data": {"root", "vocabulary"}})  # mere places
    settings["prompt"] = None  # the fingerprint has what is left of it once a preset has filled it in
    versions = VERSIONS | ({"prompt": tuning.VERSION} if learns(trial) else {})
    return content_id({"schema": SCHEMA, "trial": settings, **fingerprint, "versions": versions})


def fingerprint(trial: TrialConfig, inputs: Inputs) -> dict:
    """Of all weights and images that a trial reads, for its id."""
    return inputs.fingerprint(trial_tasks(trial)) | lessons_id(trial, inputs)


def is_fitted(trial: TrialConfig) -> bool:
    """Whether the trial's reducer ranks by something that is fitted to golden scores."""
    return getattr(REDUCERS.get(trial.pruning.reducer), "fitted", False)


def fit_tasks(trial: TrialConfig) -> list[str]:
    """The tasks whose images the ranking of a trial is fitted on; none for one that is not fitted."""
    if not is_fitted(trial):
        return []
    return trial.data.tasks if trial.predictor.fit_on == "own" else trial.predictor.fit_on


def trial_tasks(trial: TrialConfig) -> list[str]:
    """All tasks that a trial reads, each once."""
    return list(dict.fromkeys([*trial.data.tasks, *fit_tasks(trial)]))


def needed_shards(trial: TrialConfig, inputs: Inputs, root: str) -> dict[Need, tuple[ImageSplit, ShardFolder]]:
    """The sets of golden-rank shards that a trial reads, made or not, by task and part of its data."""
    settings = trial.golden.model_dump() | {"remove_at": remove_at(trial), "sha256": inputs.sha256}
    parts = ("val", "oracle") if trial.pruning.reducer == "golden" else ("val",) if is_fitted(trial) else ()
    needs = [Need(task, "train") for task in fit_tasks(trial)]
    needs += [Need(task, part) for task in trial.data.tasks for part in parts]
    splits = {need: inputs.split(*need) for need in needs}
    return {need: (split, golden.shard_folder(inputs.clip, split, root, **settings)) for need, split in splits.items()}


def run_trial(trial: TrialConfig, inputs: Inputs, root: str, shards: str, sweep: str, quiet: bool = False) -> dict:
    """Runs one configuration and writes `<root>/trials/<id>.json`, or `<id>.error.json` if it fails.

    Args:
        inputs: as `load_inputs(trial)` gave them; other trials of the same model and data may use them too.
        root, shards: folders or fsspec URLs of records, and of shards and predictors.
        sweep: name that the record carries.
    """
    identity = trial_id(trial, fingerprint(trial, inputs))
    try:
        record, arrays = _measure(trial, inputs, shards, quiet)
    except StoreError:  # the record would go where nothing can be written now
        raise
    except Exception as error:
        about = {"id": identity, "sweep": sweep, "status": "error", "config": trial.model_dump()}
        write_json(
            join(root, "trials", f"{identity}.error.json"), about | {"error": f"{type(error).__name__}: {error}"}
        )
        raise
    record = {
        "schema": SCHEMA,
        "id": identity,
        "sweep": sweep,
        "status": "ok",
        "date": f"{datetime.date.today()}",
        **record,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(join(root, "trials", f"{identity}.npz"), buffer.getvalue())
    write_json(join(root, "trials", f"{identity}.json"), record)  # last: a record means that all is there
    remove(join(root, "trials", f"{identity}.error.json"))
    return record


def _measure(trial: TrialConfig, inputs: Inputs, shards: str, quiet: bool) -> tuple[dict, dict[str, np.ndarray]]:
    clock, seconds = time.perf_counter(), {}
    folders = needed_shards(trial, inputs, shards)
    paths = {
        need: golden.make_shards(inputs.clip, split, folder, quiet=quiet) for need, (split, folder) in folders.items()
    }
    clock = _lap(seconds, "shards", clock)
    arrays: dict[str, np.ndarray] = {"grid": np.asarray(inputs.clip.visual.patch_embed.grid_size)}
    tasks: dict[str, dict] = {}
    for task in trial.data.tasks:
        tasks[task], found, costs = _measure_task(trial, task, inputs, paths, shards, quiet)
        arrays |= {f"{task}.{name}": array for name, array in found.items()}
    _lap(seconds, "tasks", clock)
    record = {
        "config": trial.model_dump(),
        "metrics": _summary(trial, inputs, tasks, arrays) | costs,
        "shards": [folder.key for _, folder in folders.values()],
        "env": {
            "patchrank": patchrank.__version__,
            "torch": torch.__version__,
            "device": inputs.clip.logit_scale.device.type,
            "threads": torch.get_num_threads(),
        },
        "seconds": seconds,
    }
    return record, arrays


def _measure_task(
    trial: TrialConfig, task: str, inputs: Inputs, paths: dict[Need, str], shards: str, quiet: bool
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, float]]:
    """Metrics of one task; per image, what they are means of; and what an image costs, which no task changes."""
    quality = _rank(trial, task, inputs, paths, shards, quiet)
    row = fit.matching(quality, inputs.clip.visual.num_patches) if quality else {}
    is_oracle = trial.pruning.reducer == "golden"
    of_val, of_test = (_oracle(trial, paths[task, part]) if is_oracle else None for part in ("val", "oracle"))
    # prompts are tuned for one order of dropping, so another order beside them would say nothing
    controls = trial.controls if trial.pruning.reducer == "predictor" and not learns(trial) else ()
    with prompted(trial, task, inputs, shards, quiet) as learned:
        val, val_split = _evaluate(trial, inputs, task, "val", (), of_val, quiet)
        test, split = _evaluate(trial, inputs, task, "oracle" if is_oracle else "test", controls, of_test, quiet)
        costs = evaluation.macs_row(inputs.clip)
    arrays = _per_image(test, split) | {f"val_{key}": array for key, array in _per_image(val, val_split).items()}
    arrays |= quality | _pictures(inputs, test, split, max(1, PICTURES // len(trial.data.tasks)))
    row |= test.row() | {f"val_{key}": value for key, value in val.row().items()} | {"n_images": len(split)}
    return row | _seen(trial, task, inputs, learned), arrays, costs


def _seen(trial: TrialConfig, task: str, inputs: Inputs, learned: Learned | None) -> dict[str, int]:
    """How many images, and labels of images, ranking and prompts have seen between them; {} without prompts."""
    if learned is None:
        return {}
    fitted_on = [task] if trial.predictor.fit_on == "own" else fit_tasks(trial)
    decides = is_fitted(trial) and inputs.clip.visual.pruner is not None  # where nothing leaves, no ranking does
    ranked = {name for each in fitted_on if decides for name in inputs.split(each, "train").ids}
    labelled = ranked if trial.golden.metric == "label" else set()
    seen = {"n_seen_images": len(ranked | learned.images), "n_seen_labels": len(labelled | learned.labels)}
    return seen | {"n_prompt_images": len(learned.images)}


def _evaluate(
    trial: TrialConfig,
    inputs: Inputs,
    task: str,
    part: str,
    controls: Sequence[str],
    scores: np.ndarray | None,
    quiet: bool,
) -> tuple[evaluation.Evaluation, ImageSplit]:
    """One part of a task's data, by the pruning in force; what no pruning changes is computed once for all trials."""
    split, unpruned = inputs.reference(task, part)
    shared = {"unpruned": unpruned, "tokens": inputs.shared_tokens(task, part)}
    found = evaluation.evaluate(inputs.clip, split, controls, scores, seed=trial.seed, quiet=quiet, **shared)
    return found, split


def _summary(trial: TrialConfig, inputs: Inputs, tasks: dict[str, dict], arrays: dict[str, np.ndarray]) -> dict:
    """A row's metrics but for costs: means over tasks, counts, and each task's own."""
    kept = arrays[f"{trial.data.tasks[0]}.pictures_kept"].shape[1]
    fitted_on = fit_tasks(trial)[:1] if trial.predictor.fit_on == "own" else fit_tasks(trial)
    counts = {
        "n_train": sum(len(inputs.split(task, "train")) for task in fitted_on),
        "n_val": sum(len(inputs.split(task, "val")) for task in trial.data.tasks),
        "n_images": sum(row["n_images"] for row in tasks.values()),
        "n_kept": kept,
        "n_tokens": inputs.clip.visual.num_patches,
    }
    return mean_over(list(tasks.values())) | counts | {"tasks": tasks}


def _rank(
    trial: TrialConfig, task: str, inputs: Inputs, paths: dict[Need, str], shards: str, quiet: bool
) -> dict[str, np.ndarray]:
    """Sets the pruning of the trial on the tower; what is fitted is fitted first, and its ranking is measured."""
    visual, settings = inputs.clip.visual, trial.pruning.model_dump()
    visual.set_pruning(keep_rate=1.0, drop_counts=None)
    if not is_fitted(trial):
        visual.set_pruning(seed=trial.seed, **settings)
        return {}
    own = [task] if trial.predictor.fit_on == "own" else trial.predictor.fit_on
    train_paths, val_path = [paths[name, "train"] for name in own], paths[task, "val"]
    metric, location = trial.golden.metric, trial.pruning.locations[0]
    train = fit.pooled([inputs.ranked(path, metric, location, quiet) for path in train_paths])
    name = _ranker_id(trial, [path.rsplit("/", 1)[-1] for path in train_paths])
    predictor = _fitted(trial, inputs.clip, train, join(shards, "predictors", f"{name}.safetensors"), quiet)
    visual.set_pruning(predictor=predictor, seed=trial.seed, **settings)
    val = inputs.ranked(val_path, metric, location, quiet)
    return inputs.once((name, val_path), lambda: fit.rank_quality(predictor, fit.prior_of(train), val))


def _ranker_id(trial: TrialConfig, shards: list[str]) -> str:
    """Names what a trial fits by all that it depends on."""
    settings = trial.predictor.model_dump(exclude={"fit_on"}) | {"seed": trial.seed}
    settings = {"name": "prior"} if trial.pruning.reducer == "prior" else settings
    what = [shards, trial.golden.metric, trial.pruning.locations[0], settings, fit.VERSION]
    return content_id(what)[:16]


def _fitted(trial: TrialConfig, clip: Clip, train: fit.Ranked, path: str, quiet: bool) -> torch.nn.Module:
    """The ranker of a trial, from the cache if one was fitted to the same shards in the same way."""
    grid, location = clip.visual.patch_embed.grid_size, trial.pruning.locations[0]
    if trial.pruning.reducer == "prior":
        return fit.fit_predictor(train, grid, "prior")
    cached = _cached(path)
    if cached is not None:
        return cached.to(clip.logit_scale.device)
    settings = trial.predictor.model_dump()
    how = {name: settings[name] for name in ("name", "loss", "epochs", "lr")} | {"seed": trial.seed, "quiet": quiet}
    predictor = fit.fit_predictor(train, grid, **how, **predictor_shape(trial))
    about = fit.describe(clip, settings["name"], location, trial.golden.metric, **predictor_shape(trial))
    save_predictor(predictor, path, about)
    return predictor


def _cached(path: str) -> torch.nn.Module | None:
    try:
        return load_predictor(path)[0]
    except StoreError:  # it may well be there
        raise
    except UserError:
        return None


def predictor_shape(trial: TrialConfig) -> dict:
    """What a predictor of a trial is built with, beside its name and tower."""
    own = {"dim": trial.predictor.dim, "head": trial.predictor.head}
    return {} if trial.predictor.name == "prior" else own


def _oracle(trial: TrialConfig, path: str) -> np.ndarray:
    """Golden scores (n, N) of a folder's images, to rank those very images by."""
    from patchrank.data.shards import read_manifest, stream

    row = read_manifest(path)["metrics"].index(trial.golden.metric)
    return np.stack([sample.scores[row] for sample in stream(path)])


def _lap(seconds: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    seconds[name] = round(now - since, 2)
    return now


def _per_image(found: evaluation.Evaluation, split: ImageSplit) -> dict[str, np.ndarray]:
    """What paired statistics need, in the order of the split."""
    arrays = {f"right_{name}": found.right(name) for name in found.answers}
    return arrays | {"same": found.same(), "cosine": found.cosine["pruned"], "ids": np.asarray(split.ids)}


def _pictures(inputs: Inputs, test: evaluation.Evaluation, split: ImageSplit, count: int) -> dict[str, np.ndarray]:
    """The first images and what survives of them, for a report to draw."""
    count = min(count, len(split))
    side = inputs.clip.visual.pretrained_cfg["input_size"][-1]
    pictures = [np.asarray(ImageOps.fit(split.image(i), (side, side))) for i in range(count)]  # as the tower sees them
    return {"pictures": np.stack(pictures), "pictures_kept": test.kept[:count]}
