"""Sweeps of towers that have no text tower: what is refused before anything runs, and what is not."""

import numpy as np
import pytest
from helpers.small_sweep import write_sweep
from helpers.textless import create_textless
from PIL import Image

from patchrank.models.checkpoints.save import save_pretrained
from patchrank.tune.plan import check_figures, make_plan
from patchrank.tune.space import configure
from patchrank.tune.sweep import load_sweep
from patchrank.utils.errors import UserError

SEARCHED, GRID = "pruning.keep_rate: {uniform: [0.3, 0.9]}", "pruning.keep_rate: {grid: [0.3, 0.9]}"
BY_NEIGHBOURS = "objectives: [{metric: val_knn_accuracy, mode: max}]"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "toy"
    save_pretrained(create_textless().visual, folder)
    return f"local-dir:{folder}"


def plan_of(folder, model, space, more="", method="optuna"):
    write_sweep(folder, space, more=f"{more}\n")
    overrides = [f"search={{method: {method}, samples: 2}}", f"root={folder}/runs", f"trial.model.name={model}"]
    return make_plan(load_sweep(str(folder / "sweep.yaml"), [*overrides, "trial.pruning.locations=[2]"]))


def test_a_search_by_a_figure_that_no_trial_has_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="no trial of local-dir:.* returns 'val_accuracy'; try val_cosine, val_knn_acc"):
        check_figures(plan_of(tmp_path, model, SEARCHED))
    check_figures(plan_of(tmp_path, model, SEARCHED, BY_NEIGHBOURS))
    check_figures(plan_of(tmp_path, model, GRID, method="grid"))  # whose trials no figure decides on
    with pytest.raises(UserError, match="no trial of patchrank_clip_digits returns 'val_knn_accuracy'; try val_acc"):
        check_figures(plan_of(tmp_path, "patchrank_clip_digits", SEARCHED, BY_NEIGHBOURS))


def test_trials_with_prompts_are_refused(model, tmp_path):
    base = plan_of(tmp_path, model, GRID, method="grid").sweep.config.trial
    with pytest.raises(UserError, match="model local-dir:.* has no text tower, which prompts are tuned with"):
        configure(base, {"prompt": {"mode": "V", "num_tokens": 2}})


def test_trials_need_labels_for_accuracy_alone(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(20):
        Image.fromarray(np.full((30, 30, 3), 10 * n, np.uint8)).save(photos / f"{n}.png")
    base = plan_of(tmp_path, model, GRID, method="grid").sweep.config.trial
    unlabelled = {"data.tasks": ["folder"], "data.root": str(photos)}
    assert configure(base, unlabelled).tasks == ("folder",)
    with pytest.raises(UserError, match="has no labels, and a trial measures accuracy"):
        configure(base, unlabelled | {"model.name": "patchrank_clip_digits"})
