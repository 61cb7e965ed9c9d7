"""One configuration in, one result row out.

A trial makes what it needs (shards, predictor, prompts) if it is not there, without Ray, and writes its own record:
whoever runs it may be killed at any moment and loses nothing that was finished.
"""

from __future__ import annotations

import datetime
import io
import math
import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from PIL import ImageOps

import patchrank
from patchrank.config.canonical import canonical
from patchrank.data.image_split import ImageSplit
from patchrank.golden.agreement import matching
from patchrank.golden.make_shards import make_shards
from patchrank.golden.shards import read_manifest, stream
from patchrank.io import join, remove, write_atomic, write_json
from patchrank.models.answers import known_labels
from patchrank.models.clip import macs_row
from patchrank.models.embed import Evaluation, evaluate
from patchrank.trial.epochs import Steps
from patchrank.trial.identity import SCHEMA, trial_id
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.training import Learned, prompted, ranked, repaired
from patchrank.utils.errors import StoreError, UserError

PICTURES = 6  # images, over all tasks, whose surviving tokens a report can draw; of test, where that is looked at
PREFIXES = {"val": "val_", "test": "", "oracle": ""}  # of the figures of a part


def run_trial(
    trial: ResolvedTrial,
    inputs: Inputs,
    root: str,
    shards: str,
    sweep: str,
    quiet: bool = False,
    steps: Steps | None = None,
) -> dict:
    """Runs one configuration and writes `<root>/trials/<id>.json`, or `<id>.error.json` if it fails.

    Args:
        inputs: as `load_inputs` gave them for this model and data; other trials of the same may use them too, one
            after the other, since each prunes the pair for its own length.
        root, shards: folders or fsspec URLs of records, and of shards, predictors and prompts.
        sweep: name that the record carries.
        steps: hears of every epoch of what is trained, and may end the trial by raising: what it raises comes out
            here, and no record of any kind is written.
    """
    context = TrialContext(trial, inputs, shards, steps, quiet)
    identity = trial_id(context)
    path = join(root, "trials", identity)
    try:
        measured, arrays = _measure(context)
        for name, value in measured["metrics"].items():
            if isinstance(value, float) and not math.isfinite(value):  # no search may take it for a result
                raise ValueError(f"{name} is {value}, which is no result")
    except StoreError:  # the record would go where nothing can be written now
        raise
    except Exception as error:
        if steps is not None and steps.ended:
            raise
        with suppress(UserError):  # what went wrong first is what counts, and a full disk takes no records
            failed = new_record(trial, identity, sweep, "error", error=f"{type(error).__name__}: {error}")
            write_json(f"{path}.error.json", failed)
        raise
    record = new_record(trial, identity, sweep, "ok", **measured)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(f"{path}.npz", buffer.getvalue())
    write_json(f"{path}.json", record)  # last: a record means that all is there
    with suppress(UserError):  # the trial is finished, whatever becomes of an old note
        remove(f"{path}.error.json")
    return record


def new_record(trial: ResolvedTrial, identity: str, sweep: str, status: str, **content) -> dict:
    """What is written of a trial.

    Args:
        status: `ok`, `error`, or `stopped` where the trial was ended early.
        content: of `ok` what was measured, of `error` the cause, of `stopped` by which rules and how far it had come.
    """
    about = {"schema": SCHEMA, "id": identity, "sweep": sweep, "status": status, "date": f"{datetime.date.today()}"}
    return about | {"config": canonical(trial.config)} | content


def make_needed_shards(context: TrialContext) -> list[str]:
    """Makes what is missing of the shards that a trial reads; returns the keys of all of them."""
    for split, folder in context.needed_shards.values():
        make_shards(context.inputs.clip, split, folder, quiet=context.quiet)
    return [folder.key for _, folder in context.needed_shards.values()]


def evaluate_part(context: TrialContext, task: str, part: str) -> tuple[Evaluation, ImageSplit]:
    """One part of a task's data, by the pruning in force; what no pruning changes is computed once for all trials."""
    trial, inputs = context.trial, context.inputs
    split, unpruned = inputs.reference(task, part)
    controls = trial.controls if part == "test" else ()
    scores = None
    if trial.is_oracle:  # golden scores (n, N) of these very images rank them
        path = context.path(task, part)
        row = read_manifest(path)["metrics"].index(trial.config.golden.metric)
        scores = np.stack([sample.scores[row] for sample in stream(path)])
    known = {"unpruned": unpruned, "tokens": inputs.shared_tokens(task, part)}
    known["neighbours"] = inputs.neighbours(task, part)
    found = evaluate(inputs.clip, split, controls, scores, seed=trial.config.seed, quiet=context.quiet, **known)
    return found, split


def figures_of(context: TrialContext) -> set[str]:
    """The figures of val that all tasks of a trial have, by what its model answers and which labels are known."""
    clip, found = context.inputs.clip, {"val_cosine"}
    splits = [context.inputs.split(task, "val") for task in context.trial.tasks]
    if clip.has_text or clip.classifier is not None:
        are_known = all(known_labels(clip, split) is not None for split in splits)
        found |= {"val_agreement", "val_accuracy"} if are_known else {"val_agreement"}
    if not clip.has_text and all(split.labels is not None for split in splits):
        found |= {"val_knn_accuracy", "val_knn_agreement"}
    return found


def mean_over(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means of what all rows have."""
    shared = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: float(np.mean([row[key] for row in rows])) for key in shared}


def _measure(context: TrialContext) -> tuple[dict, dict[str, np.ndarray]]:
    """What a record says of a finished trial, and its arrays."""
    inputs, started = context.inputs, time.perf_counter()
    keys, scored = make_needed_shards(context), time.perf_counter()
    arrays: dict[str, np.ndarray] = {"grid": np.asarray(inputs.clip.visual.patch_embed.grid_size)}
    tasks: dict[str, dict] = {}
    for task in context.trial.tasks:
        tasks[task], found, costs = _measure_task(context, task)
        arrays |= {f"{task}.{name}": array for name, array in found.items()}
    measured = {
        "metrics": _summary(context, tasks, arrays) | costs,
        "shards": keys,
        "env": {
            "patchrank": patchrank.__version__,
            "torch": torch.__version__,
            "device": inputs.clip.logit_scale.device.type,
            "threads": torch.get_num_threads(),
        },
        "seconds": {"shards": round(scored - started, 2), "tasks": round(time.perf_counter() - scored, 2)},
    }
    return measured, arrays


def _measure_task(context: TrialContext, task: str) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, float]]:
    """Metrics of one task; per image, what they are means of; and what an image costs, which no task changes."""
    trial, inputs = context.trial, context.inputs
    with ranked(context, task) as quality, repaired(context, task) as solved_on, prompted(context, task) as learned:
        row = matching(quality, inputs.clip.visual.num_patches) if quality else {}
        arrays = dict(quality)
        for part in trial.parts:
            found, split = evaluate_part(context, task, part)
            row |= {PREFIXES[part] + key: value for key, value in found.row().items()}
            each = found.arrays() | {"cosine": found.cosine["pruned"], "ids": np.asarray(split.ids)}
            each |= {} if found.knn is None else {f"knn_{key}": array for key, array in found.knn.arrays().items()}
            each |= {"groups": np.asarray(split.clusters()), "unit": np.asarray(split.unit)}  # for paired statistics
            arrays |= {PREFIXES[part] + key: array for key, array in each.items()}
        costs = macs_row(inputs.clip)
        row |= {} if learned is None else _seen(context, task, learned)
        if solved_on is not None:
            row |= _seen(context, task, Learned(solved_on, set()))
            row["n_repair_images"] = row.pop("n_prompt_images")
    arrays |= _pictures(inputs, found, split, max(1, PICTURES // len(trial.tasks)))
    row["n_images"] = 0 if part == "val" else len(split)
    return row, arrays, costs


def _seen(context: TrialContext, task: str, learned: Learned) -> dict[str, int]:
    """How many images, and labels of images, ranking and prompts, or a repair, have seen between them."""
    trial, inputs, images = context.trial, context.inputs, set()
    if inputs.clip.visual.pruner is not None:  # where nothing leaves, no ranking decides on anything
        images = {name for each in trial.fitted_on(task) for name in inputs.split(each, "train").ids}
    labelled = images if trial.config.golden.metric == "label" else set()
    seen = {"n_seen_images": len(images | learned.images), "n_seen_labels": len(labelled | learned.labels)}
    return seen | {"n_prompt_images": len(learned.images)}


def _summary(context: TrialContext, tasks: dict[str, dict], arrays: dict[str, np.ndarray]) -> dict:
    """A row's metrics but for costs: means over tasks, counts, and each task's own."""
    trial, inputs = context.trial, context.inputs
    counts = {
        "n_train": sum(len(inputs.split(task, "train")) for task in trial.fitted_on(trial.tasks[0])),
        "n_val": sum(len(inputs.split(task, "val")) for task in trial.tasks),
        "n_images": sum(row["n_images"] for row in tasks.values()),
        "n_kept": arrays[f"{trial.tasks[0]}.pictures_kept"].shape[1],
        "n_tokens": inputs.clip.visual.num_patches,
    }
    unused = {task: _unused(inputs.split(task, trial.parts[-1])) for task in trial.tasks}
    return mean_over(list(tasks.values())) | counts | {"tasks": {task: tasks[task] | unused[task] for task in tasks}}


def _unused(split: ImageSplit) -> dict[str, object]:
    """What the source of a split holds beside its images, where it holds anything: broken ones, and other files."""
    found = {"n_skipped": split.skipped, "passed_over": split.passed_over}
    return {name: value for name, value in found.items() if value}


def _pictures(inputs: Inputs, found: Evaluation, split: ImageSplit, count: int) -> dict[str, np.ndarray]:
    """The first images as the tower sees them, and what survives of them, for a report to draw."""
    size = inputs.clip.visual.pretrained_cfg["input_size"][-2:]
    pictures = [np.asarray(ImageOps.fit(split.image(i), size)) for i in range(min(count, len(split)))]
    arrays = {"pictures": np.stack(pictures), "pictures_kept": found.kept[: len(pictures)]}
    return arrays if found.source is None else arrays | {"pictures_source": found.source[: len(pictures)]}
