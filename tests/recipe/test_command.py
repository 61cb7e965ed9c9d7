"""The recipe once through, on a small SigLIP and a small DINOv2 from their configs, and a folder of photographs."""

import contextlib
import io
import json
from functools import cache

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import toy_hosts
from PIL import Image
from sklearn.datasets import load_sample_images

import patchrank
from patchrank.data.dataset_factory import load_split
from patchrank.models.clip import create_clip
from patchrank.recipe import command, tries
from patchrank.trial.run import run_trial
from patchrank.utils.errors import UserError

NAMES = ["Urlaub (1).JPG", "ünïcödé {photo}.png", "IMG_0001 copy.jpeg", "$x_{2}$.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Crops of two photographs, of odd sizes and names, without labels."""
    folder = tmp_path_factory.mktemp("photos")
    draw, sources = np.random.default_rng(0), load_sample_images().images
    for n in range(110):
        (height, width), source = draw.integers(40, 120, 2), sources[n % 2]
        top, left = draw.integers(0, source.shape[0] - height), draw.integers(0, source.shape[1] - width)
        name = NAMES[n] if n < len(NAMES) else f"{n:03d}.png"
        Image.fromarray(source[top : top + height, left : left + width]).save(folder / name)
    return str(folder)


@pytest.fixture(scope="module")
def recipe_of(photos, tmp_path_factory):
    """A small model by its name, the folder that it lies in, and the recipe that was made for it there."""
    pytest.importorskip("transformers")

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp("recipe")
        model = toy_hosts.create(name)
        model.save_pretrained(folder / "model")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run(photos, folder)
        return model, folder, json.loads(printed.getvalue())

    return make


@pytest.fixture(params=["SiglipVisionModel", "Dinov2Model"])
def each(request, recipe_of):
    return recipe_of(request.param)


@pytest.fixture
def made(recipe_of):
    return recipe_of("SiglipVisionModel")


def run(photos, folder, *flags, out="out", work="work"):
    """The command on the model in a folder, with results in the same."""
    where = ["--model", f"hf:{folder}/model", "--img-size", "32", "--data", "folder", "--data-root", photos]
    goes = ["--budget", "0.6", "--out", f"{folder}/{out}", "--work", f"{folder}/{work}", "--batch-size", "2"]
    command.main([*where, *goes, *flags])


def lasting(record):
    """What a recipe says that does not depend on the clock or on where it ran."""
    figures = {key: value for key, value in record["figures"].items() if not key.startswith(("ms", "speedup"))}
    return {key: record[key] for key in ("model", "pruning", "predictor", "repair", "images")} | figures


def test_the_folder_prunes_the_model_as_its_card_says(each, photos):
    model, folder, record = each
    clip = create_clip(f"hf:{folder}/model", img_size=32)
    test = load_split("folder", "test", root=photos)
    images = torch.stack([clip.transform()(test.image(place)) for place in range(len(test))])
    with torch.no_grad():
        whole = toy_hosts.embedding(model, images)
        patchrank.prune(model, folder / "out")
        drift = 1 - F.cosine_similarity(toy_hosts.embedding(model, images), whole, dim=-1)
    patchrank.unprune(model)
    figures = record["figures"]
    assert figures["n_images"] == len(test) == record["images"]["test"]
    assert 0 < figures["drift"] == pytest.approx(drift.mean().item(), rel=0.02)
    assert 0.4 < figures["gmacs"] / figures["gmacs_unpruned"] <= 0.6
    assert 0 <= figures["image_neighbours@10"] <= 100 and "accuracy" not in figures


def test_the_card_has_the_figures_and_its_pictures(each):
    _, folder, record = each
    card = (folder / "out" / "README.md").read_text()
    assert f"| {1000 * record['figures']['drift']:.3g} |" in card and "photos" in card and "hf:" in card
    for name in ("what-goes.png", "tries.png"):
        assert f"]({name})" in card and Image.open(folder / "out" / name).size > (300, 150)
    assert "Images have 32 x 32 pixels" in card and record["img_size"] == [32, 32]
    assert json.loads((folder / "out" / "recipe.json").read_text()) == record | {"schema": 1, "kind": "recipe"}


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(made, photos, monkeypatch, capsys):
    _, folder, record = made
    calls = []

    def stopped(trial, *args, **kwargs):
        calls.append(trial)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return run_trial(trial, *args, **kwargs)

    monkeypatch.setattr(tries, "run_trial", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(photos, folder, out="again", work="other")
    assert not (folder / "again").exists()
    run(photos, folder, out="again", work="other")
    total = len(calls) - 1
    run(photos, folder, out="again", work="other")  # all is there, so nothing is tried again
    assert len(calls) == total + 1 and len({trial.config for trial in calls}) == total
    for line in capsys.readouterr().out.splitlines():
        assert lasting(json.loads(line)) == lasting(record)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--budget", "0.02"], "--budget 2 % of the MACs: no method comes down to it"),
        (["--prompts", "prompts.safetensors"], "--prompts: learned tokens have a command of their own"),
        (["--data", "fodler"], "data 'fodler' does not exist"),
        (["--out", "runs/here", "--work", "runs/here/work"], "--work .*/runs/here/work: lies in --out .*/runs/here"),
        (
            ["--out", "runs/tries/here", "--work", "runs/tries"],
            "--out .*/runs/tries/here: lies in --work .*/runs/tries",
        ),
    ],
)
def test_what_cannot_be_done_is_told(made, photos, tmp_path, flags, message):
    _, folder, _ = made
    with pytest.raises(UserError, match=message):
        run(photos, folder, *flags, out="none")
    assert not (folder / "none").exists()


def test_what_came_into_the_folder_meanwhile_is_not_lost(made, photos, monkeypatch):
    _, folder, _ = made
    measure = command.measure

    def dropped(*args):
        (folder / "late").mkdir()
        (folder / "late" / "thesis.tex").write_text("years of work")
        return measure(*args)

    monkeypatch.setattr(command, "measure", dropped)
    with pytest.raises(UserError, match="thesis.tex"):
        run(photos, folder, out="late")
    assert [path.name for path in (folder / "late").iterdir()] == ["thesis.tex"]


def test_folders_of_others_and_few_images_are_refused_before_anything_is_made(made, tmp_path, photos):
    _, folder, _ = made
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        run(photos, folder, out="mine", work="unused")
    for n in range(24):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{n}.png")
    with pytest.raises(UserError, match="are too few, at least 11 are needed"):
        run(str(tmp_path), folder, out="none", work="unused")
    assert not (folder / "unused").exists()


def test_timm_makes_an_entry_with_its_pruning_from_the_folder(photos, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, locations=(1,), init_values=0.5)
    tower = timm.create_model("patchrank_dinov2_s14", **shape)
    patchrank.save_pretrained(tower, tmp_path / "model")
    name = ["--model", f"local-dir:{tmp_path}/model"]
    run(photos, tmp_path, *name)
    record = json.loads(capsys.readouterr().out)
    repair = {"repair_path": str(tmp_path / "out" / record["repair"])} if record["repair"] else {}
    loaded = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True, **repair).eval()
    patchrank.prune(tower.eval(), tmp_path / "out")
    images = toy_hosts.images()
    assert loaded.drop_counts == tower.drop_counts and sum(tower.drop_counts) == sum(record["pruning"]["drop_counts"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), tower(images))
