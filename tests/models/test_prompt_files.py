"""Prompts files: what comes back, into which towers, and what is refused."""

import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

import patchrank
from patchrank.evaluate import main as evaluate_main
from patchrank.fit import main as fit_main
from patchrank.golden.__main__ import main as golden_main
from patchrank.layers.prompts import Prompts
from patchrank.models.checkpoints.load import load_pair, load_tower
from patchrank.models.prompt_files import describe, load_prompts, save_prompts
from patchrank.utils.errors import UserError

NAME, CLASSES, TEMPLATES = "patchrank_clip_digits", ("zero", "one"), ("a {}.",)


@pytest.fixture(scope="module")
def about():
    return describe(patchrank.create_clip(NAME, keep_rate=0.5))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompts.safetensors"


@pytest.fixture(autouse=True)
def unprompted(clip):
    """The pair that ships is shared: whatever it learns is taken out again."""
    yield
    clip.set_prompts(None)


def create(mode="TV", **changes):
    prompts = Prompts(**{"mode": mode, "num_tokens": 4, "text_dim": 64, "image_dim": 64, "seed": 3, **changes})
    with torch.no_grad():
        prompts.text.mul_(20)  # so that they matter
    return prompts


@pytest.mark.parametrize(
    "mode, changes",
    [("T", {}), ("V", {}), ("TV", {"bias": True}), ("T", {"classes": CLASSES}), ("TV", {"image_dim": 96})],
)
def test_what_was_written_comes_back(mode, changes, path, about):
    prompts = create(mode, **changes)
    save_prompts(prompts, path, {**about, "epochs": 5})
    found, said = load_prompts(path)
    assert (found.mode, found.classes, found.num_tokens) == (prompts.mode, prompts.classes, 4)
    assert found.sha256() == prompts.sha256()
    assert said["pruning"] == {
        "keep_rate": 0.5, "locations": [4, 6, 8, 10], "drop_counts": None, "reducer": "predictor", "leftovers": "drop"
    }  # fmt: skip
    assert said["epochs"] == 5 and said["model"] == about["model"] and found.about == said
    assert os.listdir(path.parent) == [path.name]
    again = path.with_name("again")
    save_prompts(found, again, said)
    assert again.read_bytes() == path.read_bytes()


@torch.no_grad()
def test_both_ways_of_loading_give_the_same_tower(clip, path, about, images):
    prompts = create()
    save_prompts(prompts, path, about)
    clip.set_prompts(prompts)
    loaded = patchrank.create_clip(NAME, prompts=path)
    tower = timm.create_model(NAME, pretrained=True, prompts_path=path).eval()
    assert torch.equal(loaded.visual(images), clip.visual(images))
    assert torch.equal(tower(images), clip.visual(images))
    assert torch.equal(loaded.zero_shot_head(CLASSES, TEMPLATES), clip.zero_shot_head(CLASSES, TEMPLATES))
    tower.set_pruning(keep_rate=0.5)
    assert tower.num_prompt_tokens == 4 and tower.forward_pruned(images).kept.shape == (4, 32)


@torch.no_grad()
def test_a_file_of_mode_t_is_for_pairs(clip, path, about, images):
    save_prompts(create("T"), path, about)
    with pytest.raises(UserError, match="prompts.safetensors: of mode T, which has no visual part.*create_clip"):
        timm.create_model(NAME, pretrained=True, prompts_path=path)
    loaded = patchrank.create_clip(NAME, prompts=path)
    assert loaded.visual.num_prompt_tokens == 0
    assert not torch.equal(loaded.zero_shot_head(CLASSES, TEMPLATES), clip.zero_shot_head(CLASSES, TEMPLATES))


@torch.no_grad()
def test_prompts_are_no_part_of_a_saved_tower_and_not_dropped_in_silence(path, about, images, tmp_path):
    save_prompts(create(), path, about)
    tower = timm.create_model(NAME, pretrained=True, prompts_path=path).eval()
    with pytest.raises(UserError, match="prompts are no part of a tower that is saved: set_prompts.None. first"):
        patchrank.save_pretrained(tower, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    tower.set_prompts(None)
    patchrank.save_pretrained(tower, tmp_path / "saved")
    assert str(path) not in (tmp_path / "saved" / "config.json").read_text()
    saved = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(saved(images), tower(images))


def test_prompts_of_other_weights_are_refused_by_name(clip, path, about, images):
    wrong = {"name": "theirs", "sha256": "0" * 64, "blocks_sha256": "1" * 64}
    save_prompts(create(), path, about | {"model": wrong})
    own, blocks = clip.sha256()[:12], clip.visual.blocks_sha256()[:12]
    prompts, _ = load_prompts(path)
    with pytest.raises(UserError, match=f"{path.name}: tuned with theirs with weights 0{{12}}, .*{NAME} with {own}"):
        clip.set_prompts(prompts)
    with pytest.raises(UserError, match=f"tuned with theirs.*weights 1{{12}}, but this tower's weights are {blocks}"):
        clip.visual.set_prompts(prompts)
    with pytest.raises(UserError, match=f"1{{12}}, but this tower's weights are {blocks}"):
        timm.create_model(NAME, pretrained=True, prompts_path=path)
    with pytest.raises(UserError, match="tuned with theirs"):
        patchrank.create_clip(NAME, prompts=path)
    assert clip.prompts is None and clip.visual.num_prompt_tokens == 0
    untrained = timm.create_model(NAME, prompts_path=path)  # as with a predictor: weights may still come
    assert untrained.num_prompt_tokens == 4
    with pytest.raises(UserError, match="tuned with theirs"):
        untrained.check_prompts()


@torch.no_grad()
def test_weights_that_prompts_were_not_tuned_with_are_taken_back(path, about, images, tmp_path):
    save_prompts(create("V"), path, about)
    clip = patchrank.create_clip(NAME, prompts=path)
    expected, other = clip.visual(images), patchrank.create_clip(NAME, pretrained=False)
    checkpoint = tmp_path / "other.safetensors"
    save_file(other.state_dict(), checkpoint)
    for load in (lambda: load_pair(clip, checkpoint), lambda: load_tower(clip.visual, checkpoint)):
        with pytest.raises(UserError, match=f"tuned with {NAME}, whose image tower has weights"):
            load()
        assert torch.equal(clip.visual(images), expected)


def test_other_classes_are_refused_by_name(path, about):
    save_prompts(create("T", classes=CLASSES), path, about)
    clip = patchrank.create_clip(NAME, prompts=path)
    with pytest.raises(UserError, match=f"{path.name}: learned for classes of its own: class 1 is 'one', not 'two'"):
        clip.zero_shot_head(("zero", "two"), TEMPLATES)


def test_other_widths_are_refused(clip, path, about):
    save_prompts(create(image_dim=96), path, about)
    with pytest.raises(UserError, match=r"shape \(b, 64\) for this image tower, but have \(4, 96\)"):
        timm.create_model(NAME, pretrained=True, prompts_path=path)
    save_prompts(create("T", text_dim=32), path, about)
    with pytest.raises(UserError, match=f"{path.name}: of text width 32, but the text tower of {NAME} has 64"):
        patchrank.create_clip(NAME, prompts=path)


def written(path, about, tensors=None, **changes):
    """A file of mode TV by hand, with some of its metadata changed."""
    shape = {"mode": "TV", "num_tokens": 4, "text_width": 64, "image_width": 64, "bias": False, "classes": None}
    shape |= {"num_norms": 0}
    metadata = {"schema": 1, "kind": "prompts", **about, **shape, **changes}
    metadata = {key: value for key, value in metadata.items() if value != "left out"}
    save_file(tensors or dict(create().state_dict()), path, {"patchrank": json.dumps(metadata)})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "predictor"}, "names no prompts of schema 1, but kind 'predictor', schema '1'"),
        ({"schema": 2}, "names no prompts of schema 1, but kind 'prompts', schema '2'"),
        ({"mode": "left out"}, "its metadata lacks mode"),
        ({"mode": "TVX"}, "prompt mode 'TVX' does not exist"),
        ({"mode": "T"}, "its tensors are .*to_visual.weight.*, but its metadata says {'text': .4, 64.}"),
        ({"num_tokens": 5}, r"'text': \(4, 64\).*, but its metadata says {'text': \(5, 64\)"),
        ({"num_tokens": 10**12}, "its metadata says"),
        ({"num_tokens": "4"}, "describes no prompts .num_tokens and widths must be whole numbers"),
        ({"num_tokens": None}, "must be whole numbers"),
        ({"image_width": None}, "must be whole numbers"),
        ({"image_width": 96}, r"its metadata says .*\(96, 64\)"),
        ({"bias": True}, "its metadata says .*to_visual.bias"),
        ({"num_norms": 26}, r"its metadata says .*'norm_gains': \(26, 64\)"),
        ({"num_norms": "26"}, "must be whole numbers"),
        ({"classes": "zero"}, "classes must be a list of names or null"),
        ({"classes": ["a", "b"]}, "class-specific prompts need mode 'T'"),
        ({"name": "couple"}, "prompt 'couple' is not registered; did you mean 'coupled'"),
        ({"name": ["coupled"]}, "describes no prompts"),
        ({"model": {"name": "n", "sha256": "0"}}, "describes no prompts .'blocks_sha256'"),
        ({"model": None}, "describes no prompts"),
        ({"pruning": 0.5}, "pruning its settings"),
        ({"tensors": {"text": torch.zeros(4, 64)}}, "its tensors are .*, but its metadata says"),
        (
            {"tensors": {"text": torch.full((4, 64), torch.nan), "to_visual.weight": torch.zeros(64, 64)}},
            "text must hold finite numbers alone",
        ),
        (
            {"tensors": {"text": torch.zeros(4, 64).long(), "to_visual.weight": torch.zeros(64, 64)}},
            "text must hold finite numbers alone",
        ),
    ],
)
def test_metadata_and_tensors_must_fit(path, about, changes, message):
    written(path, about)
    load_prompts(path)
    written(path, about, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Boom:
    def __reduce__(self):
        return os.system, ("exit 3",)


@pytest.mark.parametrize(
    "damage",
    [lambda good: pickle.dumps(Boom()), lambda good: good[:-8], lambda good: b"", lambda good: b"PK\x03\x04" + good],
    ids=["pickle", "cut", "empty", "zip"],
)
def test_damaged_files_are_refused_in_one_line(path, about, damage):
    save_prompts(create(), path, about)
    path.write_bytes(damage(path.read_bytes()))
    for load in (load_prompts, lambda file: timm.create_model(NAME, prompts_path=file)):
        with pytest.raises(UserError, match=f"prompts file .*{path.name}: cannot be read") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read .*No such file"):
        load_prompts(path)


def test_a_predictors_file_is_no_prompts_file(path):
    shipped = timm.create_model(NAME, pretrained=True).pruning.predictor_path
    with pytest.raises(UserError, match="names no prompts of schema 1, but kind 'predictor'"):
        load_prompts(shipped)
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(path)


def test_commands_take_prompts(path, about, capsys):
    save_prompts(create(), path, about)
    rows = []
    for flags in ([], ["--prompts", str(path)]):
        evaluate_main(["--data", "digits", "--split", "val", "--limit", "8", "--keep-rate", "0.5", *flags])
        rows.append(json.loads(capsys.readouterr().out))
    assert rows[0]["prompts"] is None and rows[1]["prompts"] == str(path)
    assert rows[1]["gmacs_unpruned"] == rows[0]["gmacs_unpruned"] and rows[1]["gmacs"] > rows[0]["gmacs"]
    assert rows[1]["accuracy_unpruned"] == rows[0]["accuracy_unpruned"]  # of the pair as it came
    assert rows[1]["cosine"] != rows[0]["cosine"]


def test_prompts_that_were_tuned_with_another_pruning_are_noted(path, about, capsys):
    """By settings that their file does not state, too, since these are at their default."""
    save_prompts(create(), path, about)
    argv = ["--limit", "2", "--prompts", str(path), "--keep-rate", "0.5"]
    evaluate_main(argv)
    assert "was tuned with" not in capsys.readouterr().err
    evaluate_main([*argv, "--leftovers", "merge", "--taper", "0.5"])
    assert "was tuned with leftovers drop (here merge), taper 1.0 (here 0.5)\n" in capsys.readouterr().err


def test_files_state_newer_settings_only_where_they_are_not_at_their_default(clip):
    with clip.applied(reducer="tome", budget=0.7, predictor_path=None):
        pruning = describe(clip)["pruning"]
    usual = {"keep_rate": 1.0, "locations": [4, 6, 8, 10], "drop_counts": None}
    assert pruning == usual | {"reducer": "tome", "leftovers": None, "budget": 0.7}


def test_shards_tell_prompts_apart(path, about, capsys, tmp_path):
    save_prompts(create(), path, about)
    folders, scoring = [], ["--data", "digits", "--limit", "2", "--stride", "2", "--out", str(tmp_path / "shards")]
    for flags in (["--split", "adapt"], ["--split", "adapt", "--prompts", str(path)]):
        golden_main([*scoring, *flags])
        folders.append(capsys.readouterr().out.strip())
    assert folders[0] != folders[1]
    golden_main([*scoring, "--split", "val"])
    fit = ["--shards", folders[1], "--val-shards", capsys.readouterr().out.strip(), "--out", str(tmp_path / "p")]
    with pytest.raises(UserError, match="were computed with prompts [0-9a-f]{12}, but this model has prompts none"):
        fit_main(fit)
    with pytest.raises(UserError, match="were computed with prompts none, but this model has prompts [0-9a-f]{12}"):
        fit_main([*fit, "--prompts", str(path)])
