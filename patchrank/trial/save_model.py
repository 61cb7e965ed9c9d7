"""Writes a trial's model: files that timm loads, and its figures on test, which is read once for it."""

from __future__ import annotations

import datetime
from pathlib import Path

from patchrank.config.canonical import canonical
from patchrank.io import check_writable, read_json, write_json
from patchrank.layers.predictors import save_predictor
from patchrank.layers.prompts import Prompts
from patchrank.models.checkpoints.save import CONFIG, WEIGHTS, find_target, save_pretrained, staged_directory
from patchrank.models.prompt_files import describe, save_prompts
from patchrank.report.pareto import is_number
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import evaluate_part, make_needed_shards, mean_over
from patchrank.trial.training import describe_ranker, prompted, ranked
from patchrank.utils.errors import UserError

SCHEMA = 1
PREDICTOR, PROMPTS, CHOSEN = "predictor.safetensors", "prompts.safetensors", "chosen.json"


def write_model(
    row: dict, trial: ResolvedTrial, inputs: Inputs, shards: str, folder: str | Path, quiet: bool = False
) -> dict:
    """Writes a trial's tower to a folder and reads test for it, once and on all its images.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` makes the tower again, its pruning in force. Beside it lie
    `chosen.json` (settings, figures, how to load), `predictor.safetensors` where a predictor or prior ranks, and
    `prompts.safetensors` where tokens were learned.

    Args:
        row: the trial's record; `speed`, where it is there, is what its milliseconds are from.
        trial, inputs: the trial and what it ran on.
        shards: where predictors and prompts are cached; what is not there is fitted again.
        folder: local; one that an earlier model was written to is replaced.

    Returns:
        The row's metrics, with those of test: `accuracy`, `accuracy_unpruned`, `agreement`, `cosine`, `n_images`.

    Raises:
        UserError: a folder that holds other files, an oracle, or a trial with a predictor or prompts for each task.
    """
    check_one_model(trial)
    target = find_target(folder, (CONFIG, WEIGHTS, PREDICTOR, PROMPTS, CHOSEN))
    if target.exists() and any(target.iterdir()) and "settings" not in (read_json(target / CHOSEN) or {}):
        raise UserError(f"cannot write {folder}: it holds files but no {CHOSEN} of a sweep; try a new directory")
    check_writable(target.parent)
    data = trial.config.data.model_copy(update={"n_test": None})
    whole = ResolvedTrial(trial.config.model_copy(update={"data": data, "controls": ()}))
    context = TrialContext(whole, Inputs(inputs.clip, data), shards, quiet=quiet)
    make_needed_shards(context)
    tasks = {}
    for task in whole.tasks:
        with ranked(context, task), prompted(context, task):
            found, split = evaluate_part(context, task, "test")
            tasks[task], prompts = found.row() | {"n_images": len(split)}, inputs.clip.prompts
    metrics = {key: value for key, value in row["metrics"].items() if is_number(value)}
    metrics |= mean_over(list(tasks.values()))
    metrics |= {"n_images": sum(each["n_images"] for each in tasks.values()), "tasks": tasks}
    with ranked(context, whole.tasks[0]), staged_directory(target) as staged:  # all tasks have the same ranking
        _write(context, prompts, staged)
        record = {"schema": SCHEMA, "id": row["id"], "sweep": row["sweep"], "date": f"{datetime.date.today()}"}
        record |= {"settings": canonical(whole.config), "metrics": metrics, "speed": row.get("speed")}
        write_json(staged / CHOSEN, record | {"load": _how_to_load(whole, str(folder))})
    return metrics


def check_one_model(trial: ResolvedTrial) -> None:
    """Refuses a trial that is not one deployable model.

    Raises:
        UserError: an oracle, or a trial with a predictor or prompts for each of several tasks.
    """
    if trial.is_oracle:
        raise UserError("reducer 'golden' is an oracle, which nobody could deploy; try predictor")
    tasks, each = trial.tasks, f"each of its {len(trial.tasks)} tasks"
    if len(tasks) > 1 and trial.fits_each_task and trial.prunes:
        cure = f"try trial.predictor.fit_on=[{','.join(tasks)}] in the sweep"
        raise UserError(f"this trial fits a predictor to {each}, and a folder holds one; {cure}")
    if len(tasks) > 1 and trial.learns:
        cure = f"try trial.data.tasks=[{tasks[0]}] in the sweep"
        raise UserError(f"this trial learns prompts for {each}, and a folder holds those of one; {cure}")


def _write(context: TrialContext, prompts: Prompts | None, folder: Path) -> None:
    """The tower with its ranker, and prompts. The tower comes first: its directory may hold nothing else by then."""
    clip = context.inputs.clip
    reducer = getattr(clip.visual.pruner, "reducer", None)
    has_ranker = reducer is not None and reducer.fitted
    if has_ranker:
        reducer.about = describe_ranker(context)
    save_pretrained(clip.visual, folder)
    if has_ranker:
        save_predictor(reducer.predictor, folder / PREDICTOR, reducer.about)
    if prompts is not None:
        save_prompts(prompts, folder / PROMPTS, describe(clip))


def _how_to_load(trial: ResolvedTrial, folder: str) -> dict[str, str]:
    """Python that makes the image tower, and the pair with its text tower, from a folder."""
    model, prompts = trial.config.model, f"{folder}/{PROMPTS}" if trial.learns else None
    visual = f", prompts_path={prompts!r}" if trial.learns_visual else ""
    settings = {"checkpoint": model.checkpoint, "prompts": prompts, "img_size": model.img_size}
    settings |= {"predictor_path": f"{folder}/{PREDICTOR}"} if trial.is_fitted and trial.prunes else {}
    settings |= canonical(trial.config.pruning, "pruning") | {"seed": trial.config.seed}
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
    return {
        "tower": f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True{visual})",
        "pair": f"patchrank.create_clip({model.name!r}, {arguments})",
    }
