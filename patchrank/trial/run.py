"""One configuration in, one result row out.

A trial makes what it needs (shards, predictor) if it is not there, without Ray, and writes its own record: whoever
runs it may be killed at any moment and loses nothing that was finished.
"""

from __future__ import annotations

import datetime
import io
import math
import time
from contextlib import suppress
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import ImageOps

import patchrank
from patchrank import evaluate as evaluation
from patchrank import fit
from patchrank.config import TrialConfig
from patchrank.data.image_split import ImageSplit
from patchrank.golden import scores
from patchrank.golden.agreement import matching
from patchrank.golden.make_shards import make_shards as score_split
from patchrank.golden.make_shards import shard_folder
from patchrank.golden.shards import ShardFolder, read_manifest, stream
from patchrank.io import content_id, join, remove, write_atomic, write_json
from patchrank.prompt import tuning
from patchrank.trial import prompts as tuned
from patchrank.trial import ranking as fitted
from patchrank.trial.epochs import Steps
from patchrank.trial.inputs import Inputs, mean_over
from patchrank.trial.prompts import Learned, learns, lessons_id, prompted
from patchrank.trial.ranking import fit_tasks, is_fitted
from patchrank.trial.ranking import predictor_shape as predictor_shape
from patchrank.utils.errors import StoreError, UserError

SCHEMA = 1
VERSIONS = {"golden": scores.VERSION, "fit": fit.VERSION, "evaluate": evaluation.VERSION}
PICTURES = 6  # images, over all tasks, whose surviving tokens a report can draw; of test, where that is looked at
PREFIXES = {"val": "val_", "test": "", "oracle": ""}  # of the figures of a part


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


def trial_tasks(trial: TrialConfig) -> list[str]:
    """All tasks that a trial reads, each once."""
    return list(dict.fromkeys([*trial.data.tasks, *fit_tasks(trial)]))


def evaluated_parts(trial: TrialConfig) -> list[str]:
    """The parts of a task's data that a trial is evaluated on; `n_test: 0` keeps test out of its sight altogether."""
    last = "oracle" if trial.pruning.reducer == "golden" else "test"
    return ["val"] if trial.data.n_test == 0 else ["val", last]


def needed_shards(trial: TrialConfig, inputs: Inputs, root: str) -> dict[Need, tuple[ImageSplit, ShardFolder]]:
    """The sets of golden-rank shards that a trial reads, made or not, by task and part of its data."""
    settings = trial.golden.model_dump() | {"remove_at": remove_at(trial), "sha256": inputs.sha256}
    parts = evaluated_parts(trial) if trial.pruning.reducer == "golden" else ["val"] if is_fitted(trial) else []
    needs = [Need(task, "train") for task in fit_tasks(trial)]
    needs += [Need(task, part) for task in trial.data.tasks for part in parts]
    splits = {need: inputs.split(*need) for need in needs}
    return {need: (split, shard_folder(inputs.clip, split, root, **settings)) for need, split in splits.items()}


def num_steps(trial: TrialConfig, inputs: Inputs, of: Literal["predictor", "prompt"]) -> int:
    """How many steps a trial reports if nothing it trains is there already (see `patchrank.trial.epochs`), or 0."""
    return fitted.num_epochs(trial) if of == "predictor" else tuned.num_epochs(trial, inputs)


def make_shards(trial: TrialConfig, inputs: Inputs, root: str, quiet: bool) -> dict[Need, str]:
    """Makes what is missing of the shards that a trial reads; their folders, by task and part of its data."""
    folders = needed_shards(trial, inputs, root)
    return {need: score_split(inputs.clip, split, folder, quiet=quiet) for need, (split, folder) in folders.items()}


def run_trial(
    trial: TrialConfig,
    inputs: Inputs,
    root: str,
    shards: str,
    sweep: str,
    quiet: bool = False,
    steps: Steps | None = None,
) -> dict:
    """Runs one configuration and writes `<root>/trials/<id>.json`, or `<id>.error.json` if it fails.

    Args:
        inputs: as `load_inputs(trial)` gave them; other trials of the same model and data may use them too, one after
            the other, since each prunes the pair for its own length.
        root, shards: folders or fsspec URLs of records, and of shards and predictors.
        sweep: name that the record carries.
        steps: hears of every epoch of what is trained, and may end the trial by raising: what it raises comes out
            here, and no record of any kind is written.
    """
    identity = trial_id(trial, fingerprint(trial, inputs))
    try:
        record, arrays = _measure(trial, inputs, shards, quiet, steps)
        _check_finite(record["metrics"])
    except StoreError:  # the record would go where nothing can be written now
        raise
    except Exception as error:
        if steps is not None and steps.ended:
            raise
        with suppress(UserError):  # what went wrong first is what counts, and a full disk takes no records
            failed = error_record(trial, identity, sweep, f"{type(error).__name__}: {error}")
            write_json(join(root, "trials", f"{identity}.error.json"), failed)
        raise
    finally:
        inputs.clip.visual.set_pruning(keep_rate=1.0, drop_counts=None)
    record = _about(trial, identity, sweep, "ok") | record
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(join(root, "trials", f"{identity}.npz"), buffer.getvalue())
    write_json(join(root, "trials", f"{identity}.json"), record)  # last: a record means that all is there
    with suppress(UserError):  # it is finished, whatever becomes of an old note
        remove(join(root, "trials", f"{identity}.error.json"))
    return record


def _check_finite(metrics: dict) -> None:
    """Raises `ValueError` for a result that is no number: no search may take it for one."""
    wrong = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {metrics[wrong[0]]}, which is no result")


def error_record(trial: TrialConfig, identity: str, sweep: str, error: str) -> dict:
    """What is written of a trial that failed."""
    return _about(trial, identity, sweep, "error") | {"error": error}


def stopped_record(trial: TrialConfig, identity: str, sweep: str, asha: dict, reached: dict) -> dict:
    """What is written of a trial that was ended early: by which rules, and how far it had come."""
    return _about(trial, identity, sweep, "stopped") | {"asha": asha, "reached": reached, "metrics": {}}


def _about(trial: TrialConfig, identity: str, sweep: str, status: str) -> dict:
    about = {"schema": SCHEMA, "id": identity, "sweep": sweep, "status": status, "date": f"{datetime.date.today()}"}
    return about | {"config": trial.model_dump()}


def _measure(
    trial: TrialConfig, inputs: Inputs, shards: str, quiet: bool, steps: Steps | None
) -> tuple[dict, dict[str, np.ndarray]]:
    clock, seconds = time.perf_counter(), {}
    paths = make_shards(trial, inputs, shards, quiet)
    clock = _lap(seconds, "shards", clock)
    arrays: dict[str, np.ndarray] = {"grid": np.asarray(inputs.clip.visual.patch_embed.grid_size)}
    tasks: dict[str, dict] = {}
    for task in trial.data.tasks:
        tasks[task], found, costs = _measure_task(trial, task, inputs, paths, shards, quiet, steps)
        arrays |= {f"{task}.{name}": array for name, array in found.items()}
    _lap(seconds, "tasks", clock)
    record = {
        "metrics": _summary(trial, inputs, tasks, arrays) | costs,
        "shards": [path.rsplit("/", 1)[-1] for path in paths.values()],
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
    trial: TrialConfig,
    task: str,
    inputs: Inputs,
    paths: dict[Need, str],
    shards: str,
    quiet: bool,
    steps: Steps | None,
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, float]]:
    """Metrics of one task; per image, what they are means of; and what an image costs, which no task changes."""
    quality = fitted.rank(trial, task, inputs, paths, shards, quiet, steps)
    row, arrays = matching(quality, inputs.clip.visual.num_patches) if quality else {}, dict(quality)
    with prompted(trial, task, inputs, shards, quiet, steps) as learned:
        for part in evaluated_parts(trial):
            found, split = evaluate_part(trial, inputs, task, part, paths, quiet)
            row |= {PREFIXES[part] + key: value for key, value in found.row().items()}
            arrays |= {PREFIXES[part] + key: array for key, array in _per_image(found, split).items()}
        costs = evaluation.macs_row(inputs.clip)
    arrays |= _pictures(inputs, found, split, max(1, PICTURES // len(trial.data.tasks)))
    row["n_images"] = len(split) if part != "val" else 0
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


def evaluate_part(
    trial: TrialConfig, inputs: Inputs, task: str, part: str, paths: dict[Need, str], quiet: bool
) -> tuple[evaluation.Evaluation, ImageSplit]:
    """One part of a task's data, by the pruning in force; what no pruning changes is computed once for all trials.

    Args:
        paths: of golden-rank shards, by which oracles rank.
    """
    split, unpruned = inputs.reference(task, part)
    scores = _oracle(trial, paths[task, part]) if trial.pruning.reducer == "golden" else None
    # prompts are tuned for one order of dropping, so another order beside them would say nothing
    controls = trial.controls if part == "test" and trial.pruning.reducer == "predictor" and not learns(trial) else ()
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


def _oracle(trial: TrialConfig, path: str) -> np.ndarray:
    """Golden scores (n, N) of a folder's images, to rank those very images by."""
    row = read_manifest(path)["metrics"].index(trial.golden.metric)
    return np.stack([sample.scores[row] for sample in stream(path)])


def _lap(seconds: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    seconds[name] = round(now - since, 2)
    return now


def _per_image(found: evaluation.Evaluation, split: ImageSplit) -> dict[str, np.ndarray]:
    """What paired statistics need, in the order of the split."""
    arrays = {f"right_{name}": found.right(name) for name in found.answers}
    drawn_by = {"ids": np.asarray(split.ids), "groups": np.asarray(split.clusters()), "unit": np.asarray(split.unit)}
    return arrays | {"same": found.same(), "cosine": found.cosine["pruned"]} | drawn_by


def _pictures(inputs: Inputs, test: evaluation.Evaluation, split: ImageSplit, count: int) -> dict[str, np.ndarray]:
    """The first images and what survives of them, for a report to draw."""
    count = min(count, len(split))
    side = inputs.clip.visual.pretrained_cfg["input_size"][-1]
    pictures = [np.asarray(ImageOps.fit(split.image(i), (side, side))) for i in range(count)]  # as the tower sees them
    return {"pictures": np.stack(pictures), "pictures_kept": test.kept[:count]}
