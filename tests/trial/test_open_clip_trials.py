"""Trials on a model that `open_clip:...` names: their ids, their records, their milliseconds, the model they leave."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from helpers.open_clip_files import CONFIG, write_config, write_model

import patchrank  # noqa: F401, which `load` names
from patchrank.config import BenchmarkConfig, TrialConfig
from patchrank.data.dataset_factory import load_split
from patchrank.models.embed import evaluate
from patchrank.models.model_name import stable_name
from patchrank.trial.check import check_trial, counted_gmacs
from patchrank.trial.identity import speed_settings, trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import run_trial
from patchrank.trial.save_model import write_model as write_best
from patchrank.trial.speed import measure_trial
from patchrank.tune.sweep import load_sweep
from patchrank.utils.errors import UserError

BASE = {
    "data": {"tasks": ["digits"], "n_train": 8, "n_val": 6, "n_test": 6},
    "golden": {"window": 2, "stride": 2, "remove_at": 2},
    "predictor": {"epochs": 1},
    "pruning": {"locations": [2], "keep_rate": 0.5},
}
VISION = CONFIG["vision_cfg"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("toy"))


def trial_of(name, checkpoint, **changes):
    return ResolvedTrial(
        TrialConfig.model_validate(BASE | {"model": {"name": name, "checkpoint": checkpoint}} | changes)
    )


def inputs_of(trial):
    return load_inputs(trial.config.model, trial.config.data)


def id_of(trial):
    return trial_id(TrialContext(trial, inputs_of(trial)))


def test_ids_depend_on_the_configs_content_and_not_on_folders(files, tmp_path):
    name, checkpoint = files
    moved = f"open_clip:{shutil.copy(name.removeprefix('open_clip:'), tmp_path)}"
    here, there = trial_of(name, checkpoint), trial_of(moved, shutil.copy(checkpoint, tmp_path))
    assert id_of(here) == id_of(there) and speed_settings(here) == speed_settings(there)
    changes = [{"vision_cfg": VISION | {"head_width": 16}}, {"quick_gelu": False}, {"init_logit_scale": 1.0}]
    configs = [write_config(tmp_path / f"{n}/toy.json", **change) for n, change in enumerate(changes)]
    darker = tmp_path / "darker/toy.json"
    darker.parent.mkdir()
    darker.write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.1, 0.1, 0.1]}}))
    others = [trial_of(config, checkpoint) for config in [*configs, f"open_clip:{darker}"]]
    assert len({id_of(trial) for trial in [here, *others]}) == 5
    assert len({speed_settings(trial)["model"] for trial in [here, *others]}) == 5


@pytest.fixture
def few(monkeypatch):
    """Few images, where all of test would be read."""

    def load(task, split, limit, *places):
        return load_split(task, split, limit or 6, *places)

    monkeypatch.setattr("patchrank.trial.inputs.load_split", load)


def test_a_trial_runs_and_leaves_a_model_that_both_libraries_load(files, few, tmp_path):
    trial = trial_of(*files)
    check_trial(trial)
    inputs = inputs_of(trial)
    record = run_trial(trial, inputs, str(tmp_path), str(tmp_path / "shards"), "test", quiet=True)
    assert record["config"]["model"]["name"] == files[0] and record["metrics"]["gmacs"] == counted_gmacs(trial)
    best = tmp_path / "best"
    write_best(record, trial, inputs, str(tmp_path / "shards"), best, quiet=True)
    names = {"open_clip_config.json", "open_clip_model.safetensors", "predictor.safetensors", "chosen.json"}
    assert {path.name for path in best.iterdir()} == names
    load = json.loads((best / "chosen.json").read_text())["load"]
    clip, theirs, val = eval(load["pair"]), eval(load["unpruned"]).eval(), load_split("digits", "val", 6)
    again = evaluate(clip, val, quiet=True).row()
    assert again["cosine"] == pytest.approx(record["metrics"]["val_cosine"], abs=1e-6)
    assert clip.sha256() == inputs.clip.sha256() and str(Path(files[1]).parent) not in load["pair"]
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(clip.visual.forward_whole(images), theirs.encode_image(images), atol=1e-5, rtol=0)
    assert open_clip.get_tokenizer(f"local-dir:{best}").context_length == 40


def test_milliseconds_are_named_by_the_config(files, tmp_path):
    trial = trial_of(files[0], None, prompt={"mode": "V"})
    record = measure_trial(trial, "cpu", BenchmarkConfig(batch_size=2, repeats=3), str(tmp_path))
    assert record["ms"] > 0 and record["settings"]["model"] == stable_name(files[0])


def test_sweeps_hold_absolute_paths(files, tmp_path, monkeypatch):
    folder = Path(files[1]).parent
    monkeypatch.chdir(folder)
    sweep = load_sweep("locations", ["trial.model.name=open_clip:toy.json", "trial.model.checkpoint=toy.safetensors"])
    model = sweep.config.trial.model
    assert (model.name, model.checkpoint) == (f"open_clip:{folder}/toy.json", f"{folder}/toy.safetensors")


@pytest.mark.parametrize(
    "model, message",
    [
        ({"name": "open_clip:nowhere.json"}, "model open_clip:nowhere.json: there is no such file"),
        ({"name": "open_clip:RN50"}, "model open_clip:RN50: its image tower has ModifiedResNet"),
        ({"name": "open_clip:ViT-B-16", "img_size": 96}, "img_size is for entries of ours"),
        ({"name": "hf:me/clip"}, "weights me/clip are not in the cache"),
    ],
    ids=str,
)
def test_models_are_checked_before_anything_starts(model, message):
    with pytest.raises(UserError, match=message):
        check_trial(ResolvedTrial(TrialConfig.model_validate(BASE | {"model": model})))


def test_big_configs_are_checked_without_memory(monkeypatch):
    def refuse(*_):
        raise AssertionError("weights were drawn")

    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *_, **__: self if self.is_meta else refuse())
    trial = TrialConfig.model_validate({"model": {"name": "open_clip:ViT-H-14"}})
    check_trial(ResolvedTrial(trial))
