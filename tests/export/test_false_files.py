"""Files that compute something else than their tower, or are not what they say: none passes."""

import json

import onnx
import pytest
from helpers.image_files import write
from helpers.toy_exports import damaged, ended, refused, with_metadata
from safetensors.torch import load_file, save_file

from patchrank.export.command import main


def shift(model, name):
    (weight,) = [each for each in model.graph.initializer if each.name.endswith(name)]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))


@pytest.mark.parametrize("weight, place", [("tower.norm.weight", 0), ("tower.patch_embed.proj.weight", 1)])
def test_a_file_that_computes_something_else_does_not_pass(weight, place, answering, photos, tmp_path, capsys):
    """Before or behind one that passes."""
    paths = [answering.onnx]
    paths.insert(place, damaged(answering, tmp_path, lambda model: shift(model, weight)))
    code, told = ended([*answering.flags, "--check", *paths, *photos], capsys)
    assert code == 1 and "no (0.0001 apart would be near enough)" in told


def negate(model):
    """The vectors of classes."""
    (softmax,) = [node for node in model.graph.node if node.output[0] == "probabilities"]
    place = list(model.graph.node).index(softmax)
    model.graph.node.insert(place, onnx.helper.make_node("Neg", [softmax.input[0]], ["negated"]))
    softmax.input[0] = "negated"


def rotate(about):
    about["classes"].append(about["classes"].pop(0))


def test_a_file_that_names_something_else_does_not_pass(answering, photos, tmp_path, capsys):
    """Its embeddings are the tower's."""
    for name in ("negated", "rotated", "more"):
        (tmp_path / name).mkdir()
    paths = [damaged(answering, tmp_path / "negated", negate), with_metadata(answering, tmp_path / "rotated", rotate)]
    paths.append(with_metadata(answering, tmp_path / "more", lambda about: about["classes"].append("bear")))
    code = main([*answering.flags, "--check", *paths, *photos[:4]])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 1 and [row["passed"] for row in rows] == [False] * 3
    assert all(row["embedding_apart"] < 1e-5 and row["same_kept"] == 12 for row in rows)


def test_a_tower_of_other_weights_is_named(answering, photos, tmp_path, capsys):
    weights = load_file(answering.flags[3])
    save_file({key: value * 1.01 for key, value in weights.items()}, tmp_path / "other.safetensors")
    flags = ["--checkpoint", tmp_path / "other.safetensors", "--check", answering.onnx, *photos]
    assert "predictor" in refused([*answering.flags, *flags], capsys)  # which was fitted to other weights
    changed = with_metadata(answering, tmp_path, lambda about: about["weights"].update(tower="0" * 64))
    told = refused([*answering.flags, "--check", changed, *photos], capsys)
    assert "was made with tower weights 000000000000, but here they are" in told and "try --checkpoint" in told


FORGED = [
    ({"choices": [["a", "b"]]}, "says that it chooses by 'a', which it does not"),
    ({"classes": [], "outputs": ["embedding", "kept"]}, "says that it gives embedding, kept, which its graph does not"),
    ({"input": {"size": [32, 24]}}, r"says that it takes images [3, 32, 24], but takes [3, 32, 32]"),
    ({"input": {"dtype": "uint8"}}, r"says that it takes images [32, 32, 3], but takes [3, 32, 32]"),
    ({"schedule": None}, "was not written by patchrank.export, or its metadata is damaged"),
    ({"choices": None}, "was not written by patchrank.export, or its metadata is damaged"),
    ({"format": "pt2"}, "was not written by patchrank.export, or its metadata is damaged"),
]


@pytest.mark.parametrize("said, told", FORGED)
def test_a_file_that_is_not_what_it_says_is_refused(said, told, answering, tmp_path, capsys):
    def change(about):
        about.update(said | {"input": about["input"] | said.get("input", {})})

    path = with_metadata(answering, tmp_path, change)
    assert f"{path}: {told}" in refused(["--check", path], capsys)


def test_files_of_others_are_refused(answering, tmp_path, capsys):
    def clear(model):
        del model.metadata_props[:]

    assert "was not written by patchrank.export" in refused(["--check", damaged(answering, tmp_path, clear)], capsys)


def test_half_a_file_is_refused(answering, tmp_path, capsys):
    with open(answering.onnx, "rb") as file:
        path = write(tmp_path / "x.onnx", file.read()[:-5000])
    assert "x.onnx: ONNX Runtime cannot load it" in refused(["--check", path], capsys)
