"""One configuration in, one result row out.

A trial makes what it needs (shards, predictor) if it is not there, without Ray, and writes its own record: whoever
runs it may be killed at any moment and loses nothing that was finished.
"""

from __future__ import annotations

import datetime
import io
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import timm
import torch

import patchrank
from patchrank import evaluate as evaluation
from patchrank import fit, golden
from patchrank.cli import check_device
from patchrank.config import TrialConfig
from patchrank.data.shards import ShardFolder
from patchrank.data.tasks import ImageSplit, load_split
from patchrank.errors import UserError, near
from patchrank.files import content_id, join, remove, write_atomic, write_json
from patchrank.layers import pruning
from patchrank.layers.predictors import create_predictor, load_predictor, save_predictor
from patchrank.models.clip import TEXT_CFGS, Clip, create_clip

SCHEMA = 1
VERSIONS = {"golden": golden.VERSION, "fit": fit.VERSION, "evaluate": evaluation.VERSION}
PICTURES = 6  # test images whose surviving tokens a report can draw


@dataclass(frozen=True)
class Inputs:
    """What a trial works on: the pair, unpruned, and the three splits of its task."""

    clip: Clip
    train: ImageSplit
    val: ImageSplit
    test: ImageSplit

    def fingerprint(self) -> dict:
        """Of weights and data: part of a trial's identity."""
        data = [
            [split.ids_sha256(), split.labels, split.classes, split.templates]
            for split in (self.train, self.val, self.test)
        ]
        return {"model": self.clip.sha256(), "data": content_id(data)}


def load_inputs(trial: TrialConfig, device: str = "cpu") -> Inputs:
    """Raises `UserError` for a model, checkpoint or task that cannot be had."""
    check_device(device)
    data = trial.data
    clip = create_clip(trial.model.name, checkpoint=trial.model.checkpoint, device=device)
    counts = {"adapt": data.n_train, "val": data.n_val, "test": data.n_test}
    return Inputs(clip, *(load_split(data.tasks[0], split, count, data.root) for split, count in counts.items()))


def check_trial(trial: TrialConfig) -> None:
    """Checks a configuration against registries, depth and grid, before anything starts.

    Raises:
        UserError: names the setting, the rule it broke and the near alternative.
    """
    name = trial.model.name.split(".")[0]
    if name not in TEXT_CFGS:
        raise UserError(f"model.name {name!r} does not exist; {near(name, TEXT_CFGS)}")
    load_split(trial.data.tasks[0], "test", 1, trial.data.root)
    tower = _empty_tower(name)
    pruning.check_locations((remove_at(trial),), len(tower.blocks))
    pruning.windows(tower.patch_embed.grid_size, trial.golden.window, trial.golden.stride)
    create_predictor(trial.predictor.name, tower.embed_dim, tower.patch_embed.grid_size, **_shape(trial))
    if trial.predictor.loss not in fit.LOSSES:
        raise UserError(
            f"predictor.loss {trial.predictor.loss!r} does not exist; {near(trial.predictor.loss, fit.LOSSES)}"
        )
    tower.set_pruning(**trial.pruning.model_dump(), predictor_init="random")


@lru_cache(maxsize=4)
def _empty_tower(name: str) -> torch.nn.Module:
    """A tower without weights, to check settings against."""
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name)


def remove_at(trial: TrialConfig) -> int:
    """The layer before which golden windows leave."""
    return trial.pruning.locations[0] if trial.golden.remove_at == "first" else trial.golden.remove_at


def trial_id(trial: TrialConfig, fingerprint: dict) -> str:
    """Names a trial by all that its result depends on."""
    return content_id({"schema": SCHEMA, "trial": trial.model_dump(), **fingerprint, "versions": VERSIONS})


def needed_shards(trial: TrialConfig, inputs: Inputs, root: str) -> list[tuple[ImageSplit, ShardFolder]]:
    """The sets of golden-rank shards that a trial reads, made or not."""
    splits = {"predictor": [inputs.train, inputs.val], "golden": [inputs.val, inputs.test]}
    settings = {"window": trial.golden.window, "stride": trial.golden.stride, "rounds": trial.golden.rounds}
    settings["remove_at"] = remove_at(trial)
    return [
        (split, golden.shard_folder(inputs.clip, split, root, **settings))
        for split in splits.get(trial.pruning.reducer, [])
    ]


def run_trial(trial: TrialConfig, inputs: Inputs, root: str, shards: str, sweep: str, quiet: bool = False) -> dict:
    """Runs one configuration and writes `<root>/trials/<id>.json`, or `<id>.error.json` if it fails.

    Args:
        inputs: as `load_inputs(trial)` gave them; other trials of the same model and data may use them too.
        root, shards: folders or fsspec URLs of records, and of shards and predictors.
        sweep: name that the record carries.
    """
    identity = trial_id(trial, inputs.fingerprint())
    try:
        record, arrays = _measure(trial, inputs, shards, quiet)
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
    paths = [golden.make_shards(inputs.clip, split, folder, quiet=quiet) for split, folder in folders]
    clock = _lap(seconds, "shards", clock)
    metrics = _rank(trial, inputs, shards, paths, quiet)
    clock = _lap(seconds, "fit", clock)
    of_val, of_test = (_oracle(trial, path) for path in paths) if trial.pruning.reducer == "golden" else (None, None)
    controls = evaluation.CONTROLS if trial.pruning.reducer == "predictor" else ()
    val = evaluation.evaluate(inputs.clip, inputs.val, scores=of_val, seed=trial.seed, quiet=quiet)
    test = evaluation.evaluate(inputs.clip, inputs.test, controls, of_test, seed=trial.seed, quiet=quiet)
    _lap(seconds, "evaluate", clock)
    metrics |= test.row() | evaluation.macs_row(inputs.clip)
    metrics |= {"val_accuracy": val.row()["accuracy"], "val_accuracy_unpruned": val.row()["accuracy_unpruned"]}
    metrics |= {"n_train": len(inputs.train), "n_val": len(inputs.val), "n_images": len(inputs.test)}
    metrics |= {"n_kept": test.kept.shape[1], "n_tokens": inputs.clip.visual.num_patches}
    metrics |= {"tasks": {trial.data.tasks[0]: test.row()}}
    record = {
        "config": trial.model_dump(),
        "metrics": metrics,
        "shards": [folder.key for _, folder in folders],
        "env": {
            "patchrank": patchrank.__version__,
            "torch": torch.__version__,
            "device": inputs.clip.logit_scale.device.type,
            "threads": torch.get_num_threads(),
        },
        "seconds": seconds,
    }
    return record, _arrays(inputs, test)


def _rank(trial: TrialConfig, inputs: Inputs, shards: str, paths: list[str], quiet: bool) -> dict[str, float]:
    """Sets the pruning of the trial on the tower; with a predictor, fits it first and measures its matching rate."""
    visual, settings = inputs.clip.visual, trial.pruning.model_dump()
    visual.set_pruning(keep_rate=1.0, drop_counts=None)
    if trial.pruning.reducer != "predictor":
        visual.set_pruning(seed=trial.seed, **settings)
        return {}
    metric, location = trial.golden.metric, trial.pruning.locations[0]
    train, val = (fit.read_ranked(inputs.clip, path, metric, location, quiet) for path in paths)
    predictor = _fitted(trial, inputs.clip, train, shards, paths[0].rsplit("/", 1)[-1], quiet)
    visual.set_pruning(predictor=predictor, seed=trial.seed, **settings)
    return fit.matching(predictor, fit.prior_of(train), val)


def _fitted(trial: TrialConfig, clip: Clip, train: fit.Ranked, shards: str, key: str, quiet: bool) -> torch.nn.Module:
    """The predictor of a trial, from the cache if one was fitted to the same shards in the same way."""
    settings, location = trial.predictor.model_dump(), trial.pruning.locations[0]
    what = [key, trial.golden.metric, location, settings, trial.seed, fit.VERSION]
    path = join(shards, "predictors", f"{content_id(what)[:16]}.safetensors")
    device = clip.logit_scale.device
    cached = _cached(path)
    if cached is not None:
        return cached.to(device)
    how = {name: settings[name] for name in ("name", "loss", "epochs", "lr")}
    predictor = fit.fit_predictor(
        train, clip.visual.patch_embed.grid_size, **how, seed=trial.seed, quiet=quiet, **_shape(trial)
    )
    save_predictor(
        predictor, path, fit.describe(clip, settings["name"], location, trial.golden.metric, **_shape(trial))
    )
    return predictor


def _cached(path: str) -> torch.nn.Module | None:
    try:
        return load_predictor(path)[0]
    except UserError:
        return None


def _shape(trial: TrialConfig) -> dict:
    return {"dim": trial.predictor.dim, "head": trial.predictor.head}


def _oracle(trial: TrialConfig, path: str) -> np.ndarray:
    """Golden scores (n, N) of a folder's images, to rank those very images by."""
    from patchrank.data.shards import read_manifest, stream

    row = read_manifest(path)["metrics"].index(trial.golden.metric)
    return np.stack([sample.scores[row] for sample in stream(path)])


def _lap(seconds: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    seconds[name] = round(now - since, 2)
    return now


def _arrays(inputs: Inputs, test: evaluation.Evaluation) -> dict[str, np.ndarray]:
    """Per-image correctness for paired statistics, and what a report draws."""
    count = min(PICTURES, len(inputs.test))
    side = inputs.clip.visual.pretrained_cfg["input_size"][-1]
    pictures = [np.asarray(inputs.test.image(i).resize((side, side))) for i in range(count)]
    arrays = {f"right_{name}": test.right(name) for name in test.answers}
    arrays |= {"cosine": test.cosine["pruned"], "ids": np.asarray(inputs.test.ids)}
    arrays |= {"pictures": np.stack(pictures), "pictures_kept": test.kept[:count]}
    return arrays | {"grid": np.asarray(inputs.clip.visual.patch_embed.grid_size)}
