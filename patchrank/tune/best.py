"""The trial that `--best` takes home: chosen by val, written as files that timm loads, and read on test once."""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.config import Constraint, TrialConfig
from patchrank.io import is_remote, join, read_json
from patchrank.trial.save_model import CHOSEN, choose, write_model
from patchrank.tune.console import say
from patchrank.tune.plan import Plan


def write_best(plan: Plan, rows: Sequence[dict], bounds: Sequence[Constraint], out: str | None) -> str:
    """Writes the best of the rows that keep all bounds; returns its folder, `<root>/best` where `out` is None.

    Raises:
        UserError: no row keeps the bounds, a trial that is not one model, or a folder that holds other things.
    """
    config = plan.sweep.config
    folder = out or ("best" if is_remote(config.root) else join(config.root, "best"))  # timm loads local folders alone
    row = choose(rows, config.objectives, bounds)
    trial = TrialConfig.model_validate(row["config"])
    known = read_json(join(folder, CHOSEN))
    if known is not None and known.get("id") == row["id"]:  # test is read once for a model
        figures = known["metrics"]
    else:
        figures = write_model(row, trial, plan.inputs(trial), config.shards, folder)
    shown = ("val_accuracy", "val_cosine", "gmacs", "ms", "accuracy", "accuracy_unpruned")
    told = ", ".join(f"{key} {figures[key]:.4g}" for key in shown if key in figures)
    say(f'best: {folder}  ({told})\n  timm.create_model("local-dir:{folder}", pretrained=True)')
    return folder
