"""Trials that repair the projection: what their rows and ids say, and what is kept for whoever asks next."""

import json

import pytest
import timm
from helpers.trials import runner

from patchrank import repair as stage
from patchrank.config import TrialConfig, validate
from patchrank.config.canonical import canonical
from patchrank.models.repair_files import load_repair
from patchrank.trial import training
from patchrank.trial.identity import trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import run_trial
from patchrank.trial.save_model import check_one_model, write_model
from patchrank.tune.space import configure
from patchrank.utils.errors import UserError

BASE = TrialConfig.model_validate(
    {
        "data": {"tasks": ["digits_full", "digits_ink"], "n_train": 16, "n_val": 8, "n_test": 30},
        "pruning": {"locations": [4], "reducer": "center", "keep_rate": 0.4},
    }
)
REPAIR = {"images": 80}


@pytest.fixture(scope="module")
def inputs():
    return load_inputs(BASE.model, BASE.data)


@pytest.fixture
def run(inputs, tmp_path):
    return runner(BASE, inputs, tmp_path)


def test_a_trial_with_a_repair(run, inputs, tmp_path, monkeypatch):
    plain, repaired = run(), run(repair=REPAIR)
    assert "repair" not in plain["config"] and "n_repair_images" not in plain["metrics"]
    assert repaired["config"]["repair"] == {"images": 80, "ridge": None}
    assert repaired["id"] != plain["id"]
    was, now = plain["metrics"], repaired["metrics"]
    assert now["cosine"] > was["cosine"] and now["gmacs"] == was["gmacs"]
    assert now["accuracy_unpruned"] == was["accuracy_unpruned"]
    assert (now["n_repair_images"], now["n_seen_images"], now["n_seen_labels"]) == (80, 80, 0)
    assert len(list((tmp_path / "shards/repairs").iterdir())) == 2  # one a task
    assert inputs.clip.visual.pruner is None
    monkeypatch.setattr(training, "fit_repair", lambda *_, **__: pytest.fail("it was solved again"))
    assert run(repair=REPAIR)["metrics"] == now


def test_one_repair_for_all_tasks_is_solved_on_those_that_fit_on_names(run, inputs, tmp_path):
    general = run(repair=REPAIR, predictor__fit_on=["digits_full", "digits_ink"])
    assert general["metrics"]["n_repair_images"] == 80  # in all
    (file,) = (tmp_path / "shards/repairs").iterdir()
    assert [data["task"] for data in load_repair(file).about["data"]] == ["digits_full", "digits_ink"]
    other = ResolvedTrial(validate(TrialConfig, BASE.model_dump() | {"repair": REPAIR}, "trial"))
    assert other.repaired_on("digits_ink") == ("digits_ink",) and other.all_tasks == BASE.data.tasks


def test_ids_change_where_a_repair_does_and_nowhere_else(inputs):
    def name(**changes):
        return trial_id(TrialContext(configure(BASE, changes), inputs))

    assert "repair" not in canonical(BASE)
    ids = [name(), name(repair={"images": 60}), name(repair={"images": 100}), name(repair={"images": 60, "ridge": 1.0})]
    assert len(set(ids)) == 4 and name(**{"repair.images": 60}) == ids[1]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"repair": {"images": 49}}, "repair.images is 49, but should be greater than or equal to 50"),
        ({"repair": REPAIR, "prompt": {"mode": "V"}}, "repair and prompt exclude each other"),
        ({"repair": REPAIR, "pruning.reducer": "golden"}, "'golden' is an oracle"),
        ({"repair": {"ridge": 0.0}}, "repair.ridge is 0.0"),
    ],
)
def test_impossible_repairs_are_refused(changes, told):
    with pytest.raises(UserError, match=told):
        configure(BASE, changes)


@pytest.mark.slow  # it reads all of test, as whoever writes a model does
def test_the_file_of_the_best_trial_lies_beside_its_tower(run, inputs, tmp_path):
    changes = {"repair": REPAIR, "data.tasks": ["digits_full"], "data.n_test": 20}
    trial = configure(BASE, changes)
    row = run_trial(trial, inputs, str(tmp_path), str(tmp_path / "shards"), "test", quiet=True)
    small = inputs.__class__(inputs.clip, trial.config.data)
    write_model(row, trial, small, str(tmp_path / "shards"), tmp_path / "best", quiet=True)
    load = json.loads((tmp_path / "best/chosen.json").read_text())["load"]
    assert "repair_path=" in load["pair"]
    tower = eval(load["tower"], {"timm": timm})
    assert tower.repair is not None and tower.pruning.keep_rate == 0.4


def test_a_folder_holds_one_repair():
    with pytest.raises(UserError, match="solves a repair for each of its 2 tasks"):
        check_one_model(configure(BASE, {"repair": REPAIR}))
    check_one_model(configure(BASE, {"repair": REPAIR, "predictor.fit_on": ["digits"]}))


def test_the_stage_refuses_a_pair_that_keeps_all(inputs):
    with pytest.raises(UserError, match="the pruning keeps all"):
        stage.fit_repair(inputs.clip, [inputs.split("digits_full", "train")])
