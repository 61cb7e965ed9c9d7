"""The trial that is taken home: bounds, the choice, and the folder that timm loads."""

import json
from dataclasses import replace

import pytest
import timm
import torch

import patchrank
from patchrank.config import Constraint, Objective, TrialConfig
from patchrank.data.dataset_factory import load_split
from patchrank.models.embed import evaluate
from patchrank.trial import save_model as chosen
from patchrank.trial.inputs import load_inputs
from patchrank.trial.run import run_trial
from patchrank.trial.save_model import write_model
from patchrank.tune.best import choose, parse_bounds
from patchrank.tune.space import configure
from patchrank.utils.errors import UserError

BASE = TrialConfig.model_validate(
    {
        "data": {"tasks": ["digits"], "n_train": 24, "n_val": 12, "n_test": 0},
        "golden": {"stride": 2},
        "predictor": {"epochs": 3},
        "pruning": {"locations": [4], "keep_rate": 0.4},
    }
)
OBJECTIVES = [Objective(metric="val_accuracy", mode="max"), Objective(metric="gmacs", mode="min")]
TEST = 90  # images that the tests read of a split of 2154


# ---- bounds and the choice


def test_bounds_are_read():
    assert parse_bounds("gmacs<=12, val_cosine >= 0.99,ms<=1e-1") == [
        Constraint(metric="gmacs", at_most=12.0),
        Constraint(metric="val_cosine", at_least=0.99),
        Constraint(metric="ms", at_most=0.1),
    ]


@pytest.mark.parametrize(
    "text", ["", "gmacs<12", "gmacs<=", "gmacs=12", "gmacs<=12;ms<=1", "gmacs<=nan", "12>=gmacs", "gmacs<=12,"]
)
def test_other_syntax_is_refused(text):
    with pytest.raises(UserError, match="must read metric<=number or metric>=number; try gmacs<=12"):
        parse_bounds(text)


@pytest.mark.parametrize("name, close", [("gmac", "gmacs"), ("accuracy", "val_accuracy"), ("cosine", "val_cosine")])
def test_unknown_metrics_are_refused(name, close):
    with pytest.raises(UserError, match=f"'{name}' is nothing to choose by; did you mean '{close}'"):
        parse_bounds(f"{name}<=1")


def row(name, reducer="predictor", **metrics):
    return {"id": name, "config": {"pruning": {"reducer": reducer}}, "metrics": metrics}


ROWS = [
    row("d", val_accuracy=95.0, gmacs=10.0, val_cosine=0.98),
    row("c", val_accuracy=95.0, gmacs=9.0, val_cosine=0.97),
    row("b", val_accuracy=95.0, gmacs=9.0, val_cosine=0.96),
    row("a", val_accuracy=99.0, gmacs=17.0, val_cosine=0.999),
    row("oracle", "golden", val_accuracy=100.0, gmacs=1.0, val_cosine=1.0),
    row("unmeasured", gmacs=1.0),
]


@pytest.mark.parametrize(
    "bounds, best",
    [
        ("gmacs<=100", "a"),
        ("gmacs<=12", "b"),  # a tie in accuracy and GMACs goes by id
        ("gmacs<=12,val_cosine>=0.975", "d"),
        ("gmacs<=9", "b"),
        ("val_cosine>=0.97,gmacs<=9.5", "c"),
    ],
)
def test_the_best_by_the_first_objective_within_bounds(bounds, best):
    assert choose(ROWS, OBJECTIVES, parse_bounds(bounds))["id"] == best
    assert choose(ROWS[::-1], OBJECTIVES, parse_bounds(bounds))["id"] == best


@pytest.mark.parametrize(
    "bounds, message",
    [
        ("gmacs<=0.001", "^no trial has gmacs <= 0.001; the lowest is 9$"),
        ("val_cosine>=1", "^no trial has val_cosine >= 1; the highest is 0.999$"),
        ("gmacs<=12,val_cosine>=0.99", "^no trial that keeps gmacs <= 12 has val_cosine >= 0.99; the highest is 0.98$"),
        ("ms<=3", "^no trial has ms, so none keeps ms <= 3$"),
    ],
)
def test_impossible_bounds_say_how_near_any_comes(bounds, message):
    with pytest.raises(UserError, match=message):
        choose(ROWS, OBJECTIVES, parse_bounds(bounds))


def test_nothing_to_choose_from():
    with pytest.raises(UserError, match="none has val_accuracy, oracles aside"):
        choose(ROWS[4:], OBJECTIVES, [])


# ---- the folder


@pytest.fixture(scope="module")
def inputs():
    return load_inputs(BASE.model, BASE.data)


@pytest.fixture
def reads(monkeypatch):
    """What is read of test: few images, whatever is asked for, and a note of every time."""
    real, seen = patchrank.trial.inputs.load_split, []

    def load(task, split=None, limit=None, *args):
        if split == "test":
            seen.append((task, limit))
            limit = TEST
        return real(task, split, limit, *args)

    monkeypatch.setattr("patchrank.trial.inputs.load_split", load)
    return seen


@pytest.fixture
def write(inputs, reads, tmp_path_factory):
    """Runs a trial, writes its model, and gives back folder, row, metrics of the model and `chosen.json`."""
    root = tmp_path_factory.getbasetemp() / "chosen"

    def run(folder, **changes):
        trial = configure(BASE, {key.replace("__", "."): value for key, value in changes.items()})
        own = replace(inputs, data=trial.config.data) if trial.config.data != inputs.data else inputs
        found = run_trial(trial, own, str(root), str(root / "shards"), "test", quiet=True)
        assert not reads
        metrics = write_model(found, trial, own, str(root / "shards"), folder, quiet=True)
        return found, metrics, json.loads((folder / "chosen.json").read_text())

    return run


def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


FEW = {"prompt__epochs": 1, "prompt__shots": 1}


@pytest.mark.parametrize(
    "changes, more",
    [
        ({}, ["predictor.safetensors"]),
        pytest.param({"pruning__reducer": "prior"}, ["predictor.safetensors"], marks=pytest.mark.slow),
        pytest.param({"pruning__reducer": "random", "seed": 3}, [], marks=pytest.mark.slow),
        pytest.param(
            {"pruning__reducer": "guided_merge", "pruning__budget": 0.7, "pruning__protection": 0.3},
            ["predictor.safetensors"],
            marks=pytest.mark.slow,
        ),
        ({"pruning__reducer": "center", "pruning__leftovers": "merge", "pruning__metric": "keys"}, []),
        pytest.param({"pruning__keep_rate": 1.0}, [], marks=pytest.mark.slow),
        ({"prompt__mode": "TV", **FEW}, ["predictor.safetensors", "prompts.safetensors"]),
        pytest.param(
            {"prompt__mode": "T", **FEW}, ["predictor.safetensors", "prompts.safetensors"], marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_timm_loads_what_was_measured_on_test(write, reads, tmp_path, changes, more):
    found, metrics, saved = write(tmp_path / "model", **changes)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "chosen.json", *more}
    assert reads == [("digits", None)]  # once, and all of it, whatever data.n_test says
    clip, tower = eval(saved["load"]["pair"]), eval(saved["load"]["tower"]).eval()
    again = evaluate(clip, load_split("digits", "test", TEST), quiet=True).row()
    assert {key: metrics[key] for key in again} == pytest.approx(again, abs=1e-9) and metrics["n_images"] == TEST
    with torch.inference_mode():
        assert torch.equal(tower(images()), clip.visual(images()))
    assert (tower.pruner is None) == (changes.get("pruning__keep_rate") == 1.0)
    assert saved["metrics"] == metrics and metrics["val_accuracy"] == found["metrics"]["val_accuracy"]
    assert saved["id"] == found["id"] and saved["settings"]["pruning"] == found["config"]["pruning"]


def test_the_plain_form_has_the_pruning_in_force_and_a_predictor_tied_to_its_tower(write, tmp_path):
    write(tmp_path / "model")
    tower = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert tower.drop_counts == (38,) and tower.pruner.reducer.about["model"]["sha256"] == tower.blocks_sha256()
    other = timm.create_model("patchrank_clip_digits").eval()
    with pytest.raises(UserError, match="was fitted to"):
        other.set_pruning(keep_rate=0.5, locations=(4,), predictor_path=tmp_path / "model" / "predictor.safetensors")


def test_milliseconds_come_with_their_hardware(inputs, reads, tmp_path):
    trial = configure(BASE, {"pruning.reducer": "center"})
    found = run_trial(trial, inputs, str(tmp_path), str(tmp_path), "test", quiet=True)
    found["metrics"] |= {"ms": 1.5, "ms_unpruned": 2.0}
    found["speed"] = {"hardware": {"cpu": "Some CPU"}, "ms": 1.5}
    metrics = write_model(found, trial, inputs, str(tmp_path), tmp_path / "model", quiet=True)
    saved = json.loads((tmp_path / "model" / "chosen.json").read_text())
    assert metrics["ms"] == 1.5 and saved["speed"]["hardware"] == {"cpu": "Some CPU"}
    assert inputs.clip.visual.pruner is None and inputs.data.n_test == 0


@pytest.mark.slow
def test_several_tasks_share_one_predictor_or_are_refused(write, reads, tmp_path):
    tasks = ["digits", "digits_ink"]
    with pytest.raises(UserError, match=r"a predictor to each of its 2 tasks.*fit_on=\[digits,digits_ink\]"):
        write(tmp_path / "own", data__tasks=tasks)
    prompts = {"prompt__mode": "T", **FEW, "pruning__reducer": "center"}
    with pytest.raises(UserError, match=r"prompts for each of its 2 tasks.*data.tasks=\[digits\]"):
        write(tmp_path / "prompts", data__tasks=tasks, **prompts)
    assert not reads and not list(tmp_path.iterdir())
    _, metrics, _ = write(tmp_path / "pooled", data__tasks=tasks, predictor__fit_on=tasks)
    assert [task for task, _ in reads] == tasks and metrics["n_images"] == 2 * TEST
    assert metrics["accuracy"] == pytest.approx(sum(metrics["tasks"][task]["accuracy"] for task in tasks) / 2)


def test_oracles_are_refused(inputs, reads, tmp_path):
    trial = configure(BASE, {"pruning.reducer": "golden"})
    with pytest.raises(UserError, match="oracle, which nobody could deploy; try predictor"):
        write_model({}, trial, inputs, str(tmp_path), tmp_path / "model")
    assert not reads


def test_folders_that_are_not_ours_are_left_alone(write, reads, inputs, tmp_path, monkeypatch):
    folder, center = tmp_path / "model", {"pruning__reducer": "center"}
    folder.mkdir()  # an empty one may be used
    write(folder, **center)
    reads.clear()
    write(folder, **center, pruning__keep_rate=0.5)  # and an earlier model replaced
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).drop_counts == (32,)
    reads.clear()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(chosen, "save_pretrained", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="cannot write .*model: No space left"):
        write(folder, **center)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and inputs.clip.visual.pruner is None
    reads.clear()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files, such as 'notes.txt'"):
        write(folder, **center)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")  # someone else's model
    with pytest.raises(UserError, match="holds files but no chosen.json of a sweep"):
        write(other, **center)
    assert not reads and (other / "config.json").read_text() == "{}"
