"""The folder that a recipe ends in: settings, files and a card, which `patchrank.prune` and timm read."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

import torch

import patchrank
from patchrank.config import TrialConfig
from patchrank.io import check_writable, read_json, write_atomic
from patchrank.models.checkpoints.save import CONFIG, WEIGHTS, find_target, is_entry, staged_directory
from patchrank.models.recipe_files import KIND, NAME, write_recipe
from patchrank.recipe.card import CARD, PAIRS, TRIES, write_card
from patchrank.recipe.measured import Measured
from patchrank.recipe.pictures import draw_pairs, draw_tries
from patchrank.recipe.tries import Tries
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.save_model import OPEN_CLIP_FILES, PREDICTOR, REPAIR, write_files
from patchrank.trial.training import ranked
from patchrank.utils.errors import UserError

FILES = (NAME, CARD, PAIRS, TRIES, PREDICTOR, REPAIR, CONFIG, WEIGHTS, *OPEN_CLIP_FILES)
STATED = ("reducer", "leftovers", "locations", "drop_counts", "metric", "protection", "drop_share")  # of a schedule


def check_folder(folder: str | Path) -> Path:
    """The path of a folder that may be written. Raises `UserError` where it holds what no recipe wrote."""
    target = find_target(folder, FILES)
    if target.exists() and any(target.iterdir()) and (read_json(target / NAME) or {}).get("kind") != KIND:
        raise UserError(f"cannot write {folder}: it holds files but no {NAME}; try a new directory")
    check_writable(target.parent)
    return target


def write_folder(
    target: Path, tries: Tries, choice: TrialConfig, fixed: TrialConfig, measured: Measured, about: Mapping
) -> dict:
    """Writes all files, whole or not at all; a folder that an earlier recipe wrote is replaced.

    Args:
        choice: the setting that was chosen.
        fixed: the same with the counts that leave in place of a budget.
        about: what `recipe.json` says beside all that is known here.

    Returns:
        What `recipe.json` says.

    Raises:
        UserError: the folder holds what no recipe wrote by now.
    """
    context = TrialContext(ResolvedTrial(fixed), tries.inputs, tries.shards, quiet=True)
    clip, (task,) = tries.inputs.clip, fixed.data.tasks
    pruning = {key: value for key, value in fixed.pruning.model_dump(mode="json").items() if key in STATED}
    record = {"model": {"name": clip.name, "sha256": clip.visual.blocks_sha256()}}
    record |= {"pruning": pruning | {"seed": fixed.seed}, "entry": is_entry(clip.visual)}
    record |= {"date": f"{datetime.date.today()}"}
    record |= {"predictor": PREDICTOR if context.trial.is_fitted else None, "repair": REPAIR if fixed.repair else None}
    record |= {"figures": measured.figures, **about}
    record |= {"versions": {"patchrank": patchrank.__version__, "torch": torch.__version__}}
    check_folder(target)  # once more: hours may have passed, and somebody may have put something there
    with ranked(context, task), staged_directory(target) as staged:
        write_files(context, None, staged)
        write_recipe(staged, **record)
        write_atomic(staged / CARD, write_card(record, tries.drift, choice, measured.merged))
        write_atomic(staged / PAIRS, draw_pairs(measured.pairs))
        write_atomic(staged / TRIES, draw_tries(tries.drift, choice))
    return record
