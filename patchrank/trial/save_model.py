"""Writes a trial's model: files that timm loads, and its figures on test, which is read once for it."""

from __future__ import annotations

import datetime
from pathlib import Path

from patchrank.config.canonical import canonical
from patchrank.io import check_writable, read_json, write_json
from patchrank.layers.predictors import save_predictor
from patchrank.layers.prompts import Prompts
from patchrank.models.checkpoints.save import CONFIG, WEIGHTS, find_target, is_entry, save_pretrained, staged_directory
from patchrank.models.classifier import classifier_on
from patchrank.models.model_name import is_open_clip
from patchrank.models.prompt_files import describe, save_prompts
from patchrank.models.repair_files import load_repair, save_repair
from patchrank.report.pareto import is_number
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import evaluate_part, make_needed_shards, mean_over
from patchrank.trial.training import describe_ranker, prompted, ranked, repair_file, repaired
from patchrank.utils.errors import UserError

SCHEMA = 1
OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")  # by open_clip's own names
PREDICTOR, PROMPTS, REPAIR = "predictor.safetensors", "prompts.safetensors", "repair.safetensors"
CHOSEN = "chosen.json"


def write_model(
    row: dict, trial: ResolvedTrial, inputs: Inputs, shards: str, folder: str | Path, quiet: bool = False
) -> dict:
    """Writes a trial's tower to a folder and reads test for it, once and on all its images.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` makes the tower again, its pruning in force. A model that
    `open_clip:...` names is written as open_clip's own files, which `create_clip` takes. Beside it lie
    `chosen.json` (settings, figures, how to load), `predictor.safetensors` where a predictor or prior ranks,
    `prompts.safetensors` where tokens were learned, and `repair.safetensors` where the projection was solved anew.

    Args:
        row: the trial's record; `speed`, where it is there, is what its milliseconds are from.
        trial, inputs: the trial and what it ran on.
        shards: where predictors and prompts are cached; what is not there is fitted again.
        folder: local; one that an earlier model was written to is replaced.

    Returns:
        The row's metrics, with those of test: `accuracy`, `accuracy_unpruned`, `agreement`, `cosine`, `n_images`.

    Raises:
        UserError: a folder that holds other files, an oracle, or a trial with a predictor, prompts or a repair for
            each task.
    """
    check_one_model(trial)
    target = find_target(folder, (CONFIG, WEIGHTS, *OPEN_CLIP_FILES, PREDICTOR, PROMPTS, REPAIR, CHOSEN))
    if target.exists() and any(target.iterdir()) and "settings" not in (read_json(target / CHOSEN) or {}):
        raise UserError(f"cannot write {folder}: it holds files but no {CHOSEN} of a sweep; try a new directory")
    check_writable(target.parent)
    data = trial.config.data.model_copy(update={"n_test": None})
    whole = ResolvedTrial(trial.config.model_copy(update={"data": data, "controls": ()}))
    context = TrialContext(whole, Inputs(inputs.clip, data), shards, quiet=quiet)
    make_needed_shards(context)
    tasks = {}
    for task in whole.tasks:
        with ranked(context, task), repaired(context, task), prompted(context, task):
            found, split = evaluate_part(context, task, "test")
            tasks[task], prompts = found.row() | {"n_images": len(split)}, inputs.clip.prompts
    metrics = {key: value for key, value in row["metrics"].items() if is_number(value)}
    metrics |= mean_over(list(tasks.values()))
    metrics |= {"n_images": sum(each["n_images"] for each in tasks.values()), "tasks": tasks}
    with ranked(context, whole.tasks[0]), staged_directory(target) as staged:  # all tasks have the same ranking
        write_files(context, prompts, staged)
        record = {"schema": SCHEMA, "id": row["id"], "sweep": row["sweep"], "date": f"{datetime.date.today()}"}
        record |= {"settings": canonical(whole.config), "metrics": metrics, "speed": row.get("speed")}
        write_json(staged / CHOSEN, record | {"load": _how_to_load(whole, str(folder), is_entry(inputs.clip.visual))})
    return metrics


def check_one_model(trial: ResolvedTrial) -> None:
    """Refuses a trial that is not one deployable model.

    Raises:
        UserError: an oracle, or a trial with a predictor, prompts or a repair for each of several tasks.
    """
    if trial.is_oracle:
        raise UserError("reducer 'golden' is an oracle, which nobody could deploy; try predictor")
    tasks, each = trial.tasks, f"each of its {len(trial.tasks)} tasks"
    if len(tasks) > 1 and trial.fits_each_task and trial.prunes:
        cure = f"try trial.predictor.fit_on=[{','.join(tasks)}] in the sweep"
        raise UserError(f"this trial fits a predictor to {each}, and a folder holds one; {cure}")
    if len(tasks) > 1 and trial.repairs and trial.config.predictor.fit_on == "own":
        cure = f"try trial.predictor.fit_on=[{','.join(tasks)}] in the sweep"
        raise UserError(f"this trial solves a repair for {each}, and a folder holds one; {cure}")
    if len(tasks) > 1 and trial.learns:
        cure = f"try trial.data.tasks=[{tasks[0]}] in the sweep"
        raise UserError(f"this trial learns prompts for {each}, and a folder holds those of one; {cure}")


def write_files(context: TrialContext, prompts: Prompts | None, folder: Path) -> None:
    """Writes a trial's tower with its ranker, repair and prompts; the trial's pruning must be in force.

    The tower comes first: its directory may hold nothing else. One that timm cannot make by a name of ours is not
    written: whoever has the model prunes it with the other files.
    """
    clip = context.inputs.clip
    reducer = getattr(clip.visual.pruner, "reducer", None)
    has_ranker = reducer is not None and reducer.fitted
    if has_ranker:
        reducer.about = describe_ranker(context)
    if is_open_clip(clip.name):
        from patchrank.models.open_clip.save import save_open_clip

        save_open_clip(clip, context.trial.config.model.name, folder)
    elif is_entry(clip.visual):
        with classifier_on(clip) as tower:
            save_pretrained(tower, folder)
    if has_ranker:
        save_predictor(reducer.predictor, folder / PREDICTOR, reducer.about)
    if context.trial.repairs:
        save_repair(load_repair(repair_file(context, context.trial.tasks[0])), folder / REPAIR)
    if prompts is not None:
        save_prompts(prompts, folder / PROMPTS, describe(clip))


def _how_to_load(trial: ResolvedTrial, folder: str, is_ours: bool) -> dict[str, str]:
    """Python that makes the image tower, and the pair with its text tower, from a folder.

    Of a model that `open_clip:...` names: the pair, and open_clip's own model without pruning. Of others whose tower is
    not ours, and so not in the folder: the pair, from where the model is.
    """
    model, prompts = trial.config.model, f"{folder}/{PROMPTS}" if trial.learns else None
    repair = f"{folder}/{REPAIR}" if trial.repairs else None
    visual = f", prompts_path={prompts!r}" if trial.learns_visual else ""
    visual += f", repair_path={repair!r}" if repair else ""
    name, checkpoint, theirs = model.name, model.checkpoint, is_open_clip(model.name)
    if theirs:
        name, checkpoint = f"open_clip:{folder}/{OPEN_CLIP_FILES[0]}", f"{folder}/{OPEN_CLIP_FILES[1]}"
    settings = {"checkpoint": checkpoint, "prompts": prompts, "img_size": model.img_size, "repair_path": repair}
    settings |= {"predictor_path": f"{folder}/{PREDICTOR}"} if trial.is_fitted and trial.prunes else {}
    settings |= canonical(trial.config.pruning, "pruning") | {"seed": trial.config.seed}
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
    pair, local = f"patchrank.create_clip({name!r}, {arguments})", f"local-dir:{folder}"
    if theirs:
        return {"pair": pair, "unpruned": f"open_clip.create_model({local!r})"}
    if not is_ours:
        return {"pair": pair}
    return {"tower": f"timm.create_model({local!r}, pretrained=True{visual})", "pair": pair}
