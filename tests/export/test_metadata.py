"""What files say of themselves: written and read back, damaged, and enough to make the same tower again."""

import json
import zipfile

import pytest
import torch
from helpers.tiny_exports import NAME, SETTINGS, create_tower, flags, images_of, pair_of
from safetensors.torch import load_file

from patchrank.config import DEFAULTS
from patchrank.export.description import FILES, describe, fingerprints, read_settings, settings_of
from patchrank.export.metadata import IMAGES, NEEDED, format_of, parse_metadata, read_archive
from patchrank.export.program import ClassHead, ExportedTower
from patchrank.export.towers import create_pair
from patchrank.export.towers import pair_of as as_pair
from patchrank.models.pruning_cfg import Pruning
from patchrank.utils.errors import UserError

OUTPUTS = ["probabilities", "embedding", "kept"]
TEMPLATES = ["a photo of a {}.", lambda name: f"many {name}s."]


def about(**settings):
    clip = pair_of(create_tower(**settings))
    head = ClassHead(torch.zeros(2, clip.visual.num_classes), 1.0)
    return describe(clip, ExportedTower(clip, head, uint8=True), "pt2", ["cat", "dog"], TEMPLATES)


def archive(path, text, name="archive/extra/patchrank.json"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, text)
    return str(path)


def test_what_is_said_comes_back(tmp_path):
    said = about(reducer="tome")
    path = archive(tmp_path / "tower.pt2", json.dumps(said))
    assert parse_metadata(json.dumps(said), "x.pt2") == read_archive(path) == said
    assert said["schedule"] == [[2, 8]] and said["num_patches"] == [16, 8] and said["outputs"] == OUTPUTS
    assert said["classes"] == ["cat", "dog"] and said["templates"] == ["a photo of a {}.", "many {}s."]
    stated = {"reducer": "tome", "keep_rate": 0.5, "locations": [2]}
    assert said["settings"].items() >= stated.items() and said["settings"]["drop_counts"] is None
    assert said["settings"].keys() == {"img_size", *Pruning.model_fields} - set(FILES)
    assert said["input"]["dtype"] == "uint8" and said["input"]["size"] == [32, 32]
    assert said["gmacs"][0] > said["gmacs"][1] > 0


@pytest.mark.parametrize("text", [None, "", "{", "null", "[1]", "3", '"x"', "[" * 100_000, "{}"])
def test_what_is_no_metadata_is_told_by_the_files_name(text):
    with pytest.raises(UserError, match="^some.onnx: was not written by patchrank.export, or .* damaged") as caught:
        parse_metadata(text, "some.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [*NEEDED, *(f"input.{key}" for key in IMAGES)])
@pytest.mark.parametrize("value", ["missing", None, "other"])
def test_keys_that_are_missing_or_of_another_kind_are_told(key, value):
    said = about()
    owner, _, name = key.rpartition(".")
    part = said[owner] if owner else said
    if value == "missing":
        part.pop(name)
    else:
        part[name] = value if value is None else 3.5 if isinstance(part[name], str | list | dict | int) else "3.5"
        if key == "input.crop_pct" and value == "other":
            part[name] = "3.5"
    with pytest.raises(UserError, match="^some.pt2: was not written by patchrank.export, or its metadata is damaged"):
        parse_metadata(json.dumps(said), "some.pt2")


@pytest.mark.parametrize(
    "key, value",
    [
        ("format", "onnx"),
        ("precision", "float16"),
        ("num_patches", [16]),
        ("num_patches", [16, "8"]),
        ("classes", ["cat", 3]),
        ("templates", [None]),
        ("outputs", ["embedding", "kept"]),  # with classes
        ("outputs", ["probabilities", "kept"]),
        ("outputs", ["embedding", "probabilities", "kept"]),
        ("outputs", ["probabilities", "embedding", "kept", "more"]),
        ("choices", "none"),
        ("choices", [["scores"]]),
        ("choices", [["scores", 3]]),
        ("input.size", [32]),
        ("input.size", [32, 32.5]),
        ("input.mean", [0.5, 0.5]),
        ("input.mean", [0.5, 0.5, "0.5"]),
        ("input.std", [0.5, 0.5, 0.5, 0.5]),
        ("input.crop_pct", 0),
    ],
)
def test_values_that_readers_would_stumble_over_are_told(key, value):
    said = about()
    assert parse_metadata(json.dumps(said), "some.pt2") == said
    owner, _, name = key.rpartition(".")
    (said[owner] if owner else said)[name] = value
    with pytest.raises(UserError, match="^some.pt2: was not written by patchrank.export, or its metadata is damaged"):
        parse_metadata(json.dumps(said), "some.pt2")


def test_an_onnx_file_says_what_it_chooses_by():
    said = about() | {"format": "onnx"}
    with pytest.raises(UserError, match="^some.onnx: was not written by patchrank.export, or its metadata is damaged"):
        parse_metadata(json.dumps(said), "some.onnx")
    for choices in ([], [["scores", "index"]]):
        assert parse_metadata(json.dumps(said | {"choices": choices}), "some.onnx")["choices"] == choices


def test_another_schema_is_told():
    with pytest.raises(UserError, match="^some.pt2: has metadata of schema 2, but this version reads 1; try to export"):
        parse_metadata(json.dumps(about() | {"schema": 2}), "some.pt2")


def test_what_is_no_archive_is_told(tmp_path):
    path = tmp_path / "some.pt2"
    with pytest.raises(UserError, match=f"^{path}: cannot be read .No such file"):
        read_archive(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match=f"^{path}: is no archive of torch.export; try"):
        read_archive(path)
    archive(path, b"\xff\xfe")
    with pytest.raises(UserError, match=f"^{path}: is no archive of torch.export; try"):
        read_archive(path)
    archive(path, json.dumps(about()), "archive/extra/other.json")
    with pytest.raises(UserError, match=f"^{path}: was not written by patchrank.export"):
        read_archive(path)


@pytest.mark.parametrize("path, format", [("a.onnx", "onnx"), ("a/b.PT2", "pt2"), ("a.int8.onnx", "onnx")])
def test_endings_name_formats(path, format):
    assert format_of(path) == format


@pytest.mark.parametrize("path", ["tower", "tower.pt", "onnx", "tower.onnx/file", "tower.onx", ""])
def test_other_endings_are_told(path):
    with pytest.raises(UserError, match=f"^{path}: an exported file ends in .onnx or .pt2; ") as caught:
        format_of(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kinds", [("checkpoint", "predictor", "repair"), ("checkpoint", "predictor", "prompts")])
def test_no_path_is_told_and_the_same_tower_is_made_of_what_is(kinds, files):
    """With the same files at hand, wherever they lie."""
    given = flags(**{kind: files[kind] for kind in kinds})
    with_text = "prompts" in kinds
    clip = create_pair(given, NAME, with_text, SETTINGS)
    said = describe(clip, ExportedTower(clip), "onnx", ["one"] if with_text else [], TEMPLATES)
    assert "folder_of_this_machine" not in json.dumps(said)
    assert said["model"] == NAME and said["settings"].items() >= (SETTINGS | {"locations": [2, 3]}).items()
    assert {part for part, sha in said["weights"].items() if sha} >= {"tower", "ranker", kinds[-1]}
    again = create_pair(given, said["model"], with_text, read_settings(json.loads(json.dumps(said)), "some.onnx"))
    assert fingerprints(again, with_text) == said["weights"] and settings_of(again) == said["settings"]
    assert torch.equal(again.visual.norm.weight, load_file(files["checkpoint"])["visual.norm.weight"])
    images = images_of(clip.visual)
    with torch.inference_mode():
        assert torch.equal(again.visual(images), clip.visual(images))


def test_every_setting_of_pruning_is_told(files):
    settings = {"drop_counts": (3, 4), "locations": (2, 3), "reducer": "cls_attention", "leftovers": "merge"}
    clip = create_pair(flags(checkpoint=files["checkpoint"]), NAME, False, settings | {"metric": "keys"})
    stated = settings | {"drop_counts": [3, 4], "locations": [2, 3], "metric": "keys"}
    stated |= {"keep_rate": DEFAULTS.pruning.keep_rate, "seed": DEFAULTS.seed, "taper": 1.0, "align": 1, "budget": None}
    stated |= {"drop_share": 0.0, "protection": None, "cls_only_last": "auto"}
    assert settings_of(clip) == stated
    assert clip.text is None


def test_a_tower_alone_says_its_model():
    tower = create_tower(reducer="tome")
    clip = as_pair(tower)
    assert clip.name.partition(".")[0] == NAME and clip.visual is tower and not clip.training
    assert describe(clip, ExportedTower(clip), "pt2")["settings"]["img_size"] == 32
    assert as_pair(clip) is clip
    with pytest.raises(UserError, match="^export_tower takes a pair of create_clip or .*, but got a Linear$"):
        as_pair(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("key", ["predictor_path", "repair_path", "predictor_init", "checkpoint", "keep_rat"])
def test_settings_that_no_file_of_ours_states_are_refused(key):
    with pytest.raises(UserError, match=f"^some.onnx: states '{key}' among its settings, which is none; try to export"):
        read_settings({"settings": {"keep_rate": 0.5, key: "x"}}, "some.onnx")
