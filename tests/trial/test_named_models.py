"""Trials on models of timm and transformers by name: their ids, what workers are told, the model they leave."""

import shutil

import pytest
import timm
import torch
from helpers import toy_hub

import patchrank.trial.inputs
from patchrank.config import TrialConfig
from patchrank.models.checkpoints.save import save_pretrained
from patchrank.models.clip import create_clip
from patchrank.trial.check import check_trial
from patchrank.trial.identity import trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import run_trial
from patchrank.trial.save_model import write_model
from patchrank.tune.sweep import load_sweep

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5)
BASE = {
    "data": {"tasks": ["digits"], "n_train": 8, "n_val": 6, "n_test": 6},
    "golden": {"window": 2, "stride": 2, "remove_at": 2},
    "pruning": {"locations": [2], "keep_rate": 0.5, "reducer": "center"},
}


def trial_of(name):
    return ResolvedTrial(TrialConfig.model_validate(BASE | {"model": {"name": name}}))


def inputs_of(trial):
    return load_inputs(trial.config.model, trial.config.data)


def test_ids_stay_where_folders_move_and_sweeps_make_them_absolute(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    name, moved = toy_hub.write(toy_hub.create_pair("SiglipModel"), tmp_path / "a/siglip"), tmp_path / "b/siglip"
    shutil.copytree(tmp_path / "a/siglip", moved)
    trials = [trial_of(name), trial_of(f"hf:{moved}")]
    ids = [trial_id(TrialContext(trial, inputs_of(trial), str(tmp_path))) for trial in trials]
    assert ids[0] == ids[1]
    check_trial(trials[0])
    monkeypatch.chdir(tmp_path / "b")
    sweep = load_sweep("locations", ["trial.model.name=hf:siglip"])
    assert sweep.config.trial.model.name == f"hf:{moved}"


@torch.no_grad()
def test_a_saved_classifier_is_swept_unpruned_and_left_with_its_classes(tmp_path, monkeypatch):
    real = patchrank.trial.inputs.load_split
    monkeypatch.setattr("patchrank.trial.inputs.load_split", lambda *args: real(*args).first(8))
    torch.manual_seed(0)
    tower = timm.create_model("patchrank_deit_s16", **SMALL, keep_rate=0.25, reducer="center", locations=(3,)).eval()
    save_pretrained(tower, tmp_path / "deit")
    trial = trial_of(f"local-dir:{tmp_path}/deit")
    inputs = inputs_of(trial)
    assert inputs.clip.visual.pruner is None and inputs.clip.classifier.out_features == 5
    root, shards = str(tmp_path / "run"), str(tmp_path / "shards")
    row = run_trial(trial, inputs, root, shards, "toy", quiet=True)
    write_model(row, trial, inputs, shards, tmp_path / "best", quiet=True)
    best, x = timm.create_model(f"local-dir:{tmp_path}/best", pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    assert best.num_classes == 5 and best.drop_counts == (8,) and best.pruning.locations == (2,)
    clip = create_clip(f"local-dir:{tmp_path}/best")
    assert torch.equal(clip.classifier(clip.visual(x)), best(x)) and inputs.clip.visual.num_classes == 0
    patchrank.unprune(tower), patchrank.unprune(best)
    assert torch.equal(best(x), tower(x))
