#!/usr/bin/env python3
"""Sets a recipe's choice beside the single settings of search_spaces/methods.yaml, on the same images and budget.

    python .ci/recipe_check.py runs/my-digits [DATA_ROOT]

Model, images and budget (a share of the MACs) come from the folder's recipe.json. The sweep's settings of 55 and 65 %
run at that budget, fitted to the recipe's images, without a repair and with one. Prints how far each drifts, as
1000 (1 - cosine), on the images to choose by and on the card's; then the best by the first, which is how a recipe
chooses, and the best by the second, which nobody can know. Records and golden scores stay in runs/recipe-check.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from patchrank.config import PruningConfig, RepairConfig, TrialConfig
from patchrank.io.yaml import read_yaml
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.run import run_trial
from patchrank.utils.progress import progress

SPACE = Path(__file__).parents[1] / "search_spaces/methods.yaml"
CONTROLS = ("avit_flipped", "avit_channel")  # rankings that are meant to be bad
WORK = "runs/recipe-check"


def settings(share: float) -> list[PruningConfig]:
    """Those of the two nearest budgets of the sweep, at `share` of the MACs."""
    rows = [row for row in read_yaml(SPACE)["pruning"]["grid"] if row["budget"] in (0.55, 0.65)]
    return list(
        dict.fromkeys(PruningConfig(**row | {"budget": share}) for row in rows if row["reducer"] not in CONTROLS)
    )


def base_of(recipe: dict, root: str | None) -> TrialConfig:
    """A trial on a recipe's model and images, with golden scores at each predictor's own layer, as in the sweep."""
    data = {"tasks": [recipe["data"]], "root": root} | {f"n_{part}": count for part, count in recipe["images"].items()}
    model = {"name": recipe["given"]["model"], "checkpoint": recipe["given"]["checkpoint"]}
    return TrialConfig(model=model, data=data, golden={"remove_at": "first"})


def drifts(base: TrialConfig, found: list[PruningConfig]) -> list[tuple[float, float, str]]:
    """Of each setting: drift on val, on test, and its name."""
    inputs, rows = load_inputs(base.model, base.data), []
    repairs = (None, RepairConfig(images=base.data.n_train))
    for pruning, repair in progress([(each, repair) for each in found for repair in repairs], unit="setting", delay=0):
        trial = base.model_copy(update={"pruning": pruning, "repair": repair})
        metrics = run_trial(ResolvedTrial(trial), inputs, WORK, f"{WORK}/shards", "recipe-check", quiet=True)["metrics"]
        what = [pruning.reducer, pruning.leftovers or "", str(pruning.locations), "repaired" if repair else ""]
        rows.append((*(1000 * (1 - metrics[key]) for key in ("val_cosine", "cosine")), " ".join(filter(None, what))))
    return rows


def main(folder: str, root: str | None = None) -> None:
    recipe = json.loads(Path(folder, "recipe.json").read_text())
    if not recipe["budget"].endswith("% of the MACs"):
        sys.exit(f"error: {folder}: its budget is {recipe['budget']}; try a recipe with a share of the MACs")
    share = float(recipe["budget"].split()[0]) / 100
    rows = sorted(drifts(base_of(recipe, root), settings(share)))
    for val, test, name in rows:
        print(f"{val:9.4f} {test:9.4f}  {name}")
    for what, (_, test, name) in (("val", rows[0]), ("the card's images", min(rows, key=lambda row: row[1]))):
        print(f"best by {what}: {test:.4f} on the card's images  {name}")
    print(f"the recipe's: {1000 * recipe['figures']['drift']:.4f}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
