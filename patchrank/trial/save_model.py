"""The one trial of a sweep that is taken home: chosen by figures of val, read on test once, and written as files."""

from __future__ import annotations

import datetime
from pathlib import Path

from patchrank import fit
from patchrank.config import TrialConfig
from patchrank.io import check_writable, read_json, write_json
from patchrank.layers.predictors import save_predictor
from patchrank.layers.prompts import Prompts
from patchrank.models.checkpoints.save import CONFIG, WEIGHTS, find_target, save_pretrained, staged_directory
from patchrank.models.clip import Clip
from patchrank.models.prompt_files import describe, save_prompts
from patchrank.report.pareto import is_number
from patchrank.trial.inputs import Inputs, mean_over
from patchrank.trial.prompts import learns, prompted
from patchrank.trial.ranking import is_fitted, predictor_shape, rank
from patchrank.trial.run import evaluate_part, make_shards
from patchrank.utils.errors import UserError

SCHEMA = 1
PREDICTOR, PROMPTS, CHOSEN = "predictor.safetensors", "prompts.safetensors", "chosen.json"


def write_model(
    row: dict, trial: TrialConfig, inputs: Inputs, shards: str, folder: str | Path, quiet: bool = False
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
    target = _find_target(folder)
    check_writable(target.parent)
    data = trial.data.model_copy(update={"n_test": None})
    trial, own = trial.model_copy(update={"data": data, "controls": ()}), Inputs(inputs.clip, data)
    try:
        metrics, prompts = _read_test(trial, own, shards, quiet)
        numbers = {key: value for key, value in row["metrics"].items() if is_number(value)}
        record = _record(row, trial, numbers | metrics, str(folder))
        with staged_directory(target) as staged:
            _write(trial, own.clip, prompts, staged)
            write_json(staged / CHOSEN, record)
    finally:
        own.clip.visual.set_pruning(keep_rate=1.0, drop_counts=None)
    return record["metrics"]


def _find_target(folder: str | Path) -> Path:
    """Where a model may be written: a new folder, an empty one, or one that holds an earlier model of a sweep."""
    target = find_target(folder, (CONFIG, WEIGHTS, PREDICTOR, PROMPTS, CHOSEN))
    if target.exists() and any(target.iterdir()) and "settings" not in (read_json(target / CHOSEN) or {}):
        raise UserError(f"cannot write {folder}: it holds files but no {CHOSEN} of a sweep; name a new directory")
    return target


def check_one_model(trial: TrialConfig) -> None:
    """Refuses what is no one model that could be deployed.

    Raises:
        UserError: an oracle, or a trial with a predictor or prompts for each of several tasks.
    """
    if trial.pruning.reducer == "golden":
        raise UserError("reducer 'golden' is an oracle, which nobody could deploy; near: predictor")
    tasks = trial.data.tasks
    if len(tasks) > 1 and _fits(trial) and trial.predictor.fit_on == "own":
        raise UserError(
            f"this trial fits a predictor to each of its {len(tasks)} tasks, and a folder holds one; "
            f"near: trial.predictor.fit_on=[{','.join(tasks)}] in the sweep"
        )
    if len(tasks) > 1 and learns(trial):
        raise UserError(
            f"this trial learns prompts for each of its {len(tasks)} tasks, and a folder holds those of one; "
            f"near: trial.data.tasks=[{tasks[0]}] in the sweep"
        )


def _fits(trial: TrialConfig) -> bool:
    """Whether something that was fitted ranks: where nothing leaves, nothing does."""
    return is_fitted(trial) and (trial.pruning.keep_rate < 1 or trial.pruning.drop_counts is not None)


def _read_test(trial: TrialConfig, inputs: Inputs, shards: str, quiet: bool) -> tuple[dict, Prompts | None]:
    """Sets the trial's pruning on the tower, and evaluates it with its prompts on every test image."""
    paths, tasks = make_shards(trial, inputs, shards, quiet), {}
    for task in trial.data.tasks:
        rank(trial, task, inputs, paths, shards, quiet)
        with prompted(trial, task, inputs, shards, quiet):
            found, split = evaluate_part(trial, inputs, task, "test", paths, quiet)
            tasks[task], prompts = found.row() | {"n_images": len(split)}, inputs.clip.prompts
    count = sum(each["n_images"] for each in tasks.values())
    return mean_over(list(tasks.values())) | {"n_images": count, "tasks": tasks}, prompts


def _write(trial: TrialConfig, clip: Clip, prompts: Prompts | None, folder: Path) -> None:
    """The tower first: its directory may hold nothing else while it is written."""
    reducer = getattr(clip.visual.pruner, "reducer", None)
    if reducer is not None and reducer.fitted:
        name = "prior" if trial.pruning.reducer == "prior" else trial.predictor.name
        shape = {} if name == "prior" else predictor_shape(trial)
        reducer.about = fit.describe(clip, name, trial.pruning.locations[0], trial.golden.metric, **shape)
    save_pretrained(clip.visual, folder)
    if reducer is not None and reducer.fitted:
        save_predictor(reducer.predictor, folder / PREDICTOR, reducer.about)
    if prompts is not None:
        save_prompts(prompts, folder / PROMPTS, describe(clip))


def _record(row: dict, trial: TrialConfig, metrics: dict, folder: str) -> dict:
    record = {"schema": SCHEMA, "id": row["id"], "sweep": row["sweep"], "date": f"{datetime.date.today()}"}
    record |= {"settings": trial.model_dump(), "metrics": metrics, "speed": row.get("speed")}
    return record | {"load": _how_to_load(trial, folder)}


def _how_to_load(trial: TrialConfig, folder: str) -> dict[str, str]:
    """Python that makes the image tower, and the pair with its text tower, from a folder."""
    prompts = f"{folder}/{PROMPTS}" if learns(trial) else None
    visual = f", prompts_path={prompts!r}" if prompts and "V" in trial.prompt.mode else ""
    settings = {"checkpoint": trial.model.checkpoint, "prompts": prompts}
    settings |= {"predictor_path": f"{folder}/{PREDICTOR}"} if _fits(trial) else {}
    settings |= trial.pruning.model_dump() | {"seed": trial.seed}
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
    return {
        "tower": f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True{visual})",
        "pair": f"patchrank.create_clip({trial.model.name!r}, {arguments})",
    }
