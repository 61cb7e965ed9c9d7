"""`export_tower` in Python: what it takes, what it refuses, and that a failed export leaves all as it was."""

import os

import pytest
import torch
from helpers import learned_tokens
from helpers.toy_exports import check_equal, create_tower, images_of
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from patchrank.export import write
from patchrank.export.check import CheckedFile
from patchrank.export.metadata import read_archive
from patchrank.export.write import export_tower
from patchrank.layers.prompts import Prompts
from patchrank.models.clip import create_clip
from patchrank.utils.errors import UserError

LONG = "a bird of many words " * 30


@pytest.fixture(scope="module")
def pair():
    """A random pair of toy size."""
    torch.manual_seed(0)
    shape = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 32, "locations": (1,), "keep_rate": 0.5}
    return create_clip("patchrank_clip_digits", pretrained=False, reducer="center", **shape)


def refused(model, path, *args, **how) -> str:
    """The one line that an export ends with, after which no file is there that was not there before."""
    before = sorted(path.parent.rglob("*")) if path.parent.is_dir() else []
    with pytest.raises(UserError) as told:
        export_tower(model, path, *args, **how)
    assert (sorted(path.parent.rglob("*")) if path.parent.is_dir() else []) == before
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.slow
def test_a_pair_and_its_tower_alone_give_the_same_embeddings(pair, tmp_path):
    about = export_tower(pair, tmp_path / "pair.pt2", ["cat", "dog"], ["{}", "a photo of a {}."])
    alone = export_tower(pair.visual, tmp_path / "tower.pt2")
    assert about["weights"]["text"] and about["weights"]["tower"] == alone["weights"]["tower"]
    assert (alone["classes"], alone["templates"], alone["weights"]["text"]) == ([], [], None)
    assert alone["model"] == "patchrank_clip_digits.embedded" and read_archive(tmp_path / "tower.pt2") == alone
    images = images_of(3)
    theirs, ours = (CheckedFile(str(tmp_path / f"{name}.pt2")).run(images)[0] for name in ("pair", "tower"))
    assert torch.equal(theirs["embedding"], ours["embedding"]) and torch.equal(theirs["kept"], ours["kept"])


@pytest.mark.slow
def test_weights_that_are_views_are_written_whole(answering, tmp_path, recwarn):
    export_tower(answering.clip, tmp_path / "toy.pt2", answering.classes)
    check_equal(answering.clip.visual, str(tmp_path / "toy.pt2"), batches=(2,))
    assert not [str(each.message) for each in recwarn if each.category is UserWarning]


@pytest.mark.parametrize("other", [nn.Linear(2, 2), "tower", None])
def test_anything_else_is_refused(other, tmp_path):
    told = refused(other, tmp_path / "x.pt2")
    assert told.startswith("export_tower takes a pair of create_clip or one of our towers") and told.endswith(
        f"but got a {type(other).__name__}"
    )


def test_a_tower_alone_has_no_text_for_classes(tmp_path):
    assert "classes need a text tower" in refused(create_tower(), tmp_path / "x.pt2", ["cat"])


@pytest.mark.parametrize(
    "classes, templates, told",
    [
        (["cat", LONG], ["a photo of a {}."], "1 of 2 captions are longer than the 77 tokens of the text tower"),
        (["cat"], [LONG + "{}", "{}"], "1 of 2 captions are longer than the 77 tokens"),
        ("cat", ["{}"], "cat"),
        (["cat", ""], ["{}"], "''"),
        (["cat"], ["a photo"], "a photo"),
        (["cat"], [], "template"),
    ],
)
def test_class_heads_that_cannot_be_are_refused_before_anything_is_traced(
    classes, templates, told, pair, tmp_path, monkeypatch
):
    monkeypatch.setattr(write, "trace", lambda *args: pytest.fail("was traced"))
    assert told in refused(pair, tmp_path / "x.onnx", classes, templates)


@pytest.mark.slow
def test_learned_text_takes_the_place_of_templates(tmp_path):
    torch.manual_seed(0)
    shape = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32, "locations": (1,), "keep_rate": 0.5}
    pair = create_clip("patchrank_clip_digits", pretrained=False, reducer="center", **shape)
    prompts = learned_tokens.create("TV", text_dim=pair.text.width)
    pair.set_prompts(prompts)
    about = export_tower(pair, tmp_path / "x.pt2", ["cat", "dog"], ["never read {}"])
    assert about["templates"] == [] and about["weights"]["prompts"] == prompts.sha256()
    check_probabilities(tmp_path / "x.pt2", pair, ["{}"])
    assert not torch.equal(
        pair.zero_shot_head(["cat", "dog"], ["{}"]), pair.zero_shot_head(["cat", "dog"], ["{}"], prompted=False)
    )


def test_int8_goes_beside_onnx_and_nowhere_else(tmp_path):
    tower = create_tower()
    onnx, pt2 = tmp_path / "x.onnx", tmp_path / "x.pt2"
    assert "is where the file in float32 goes" in refused(tower, onnx, int8=onnx)
    assert "is where the file in float32 goes" in refused(tower, onnx, int8=f"{tmp_path}/../{tmp_path.name}/x.onnx")
    assert "is of ONNX alone" in refused(tower, pt2, int8=tmp_path / "y.onnx")
    assert "is of ONNX alone" in refused(tower, onnx, int8=pt2)


@pytest.mark.parametrize("as_int8", [False, True])
def test_places_that_cannot_be_written_are_told_before_anything_is_traced(as_int8, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "trace", lambda *args: pytest.fail("was traced"))
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("")
    places = {"folder.onnx": "it is a folder", "file/x.onnx": "cannot write", "x.bin": "ends in .onnx"}
    places["y" * 260 + ".onnx"] = "y.onnx (File name too long); try another folder or name"
    for place, told in places.items():
        path, int8 = ("good.onnx", place) if as_int8 else (place, None)
        assert told in refused(create_tower(), tmp_path / path, int8=int8 and tmp_path / int8)


def test_a_file_that_was_there_survives_an_export_that_fails(tmp_path, monkeypatch):
    path, int8 = tmp_path / "x.onnx", tmp_path / "y.onnx"
    for each in (path, int8):
        each.write_text("as before")

    def fail(*args):
        raise UserError("the disk is full")

    monkeypatch.setattr(write, "trace", lambda *args: None)
    monkeypatch.setattr(write.onnx_format, "to_onnx", lambda *args: None)
    monkeypatch.setattr(write.onnx_format, "choices_of", lambda *args: [])
    monkeypatch.setattr(write.onnx_format, "finished", lambda *args: b"new")
    monkeypatch.setattr(write.onnx_format, "to_int8", fail)
    assert refused(create_tower(), path, int8=int8) == "the disk is full"
    assert path.read_text() == int8.read_text() == "as before"
    monkeypatch.undo()
    assert "hooks" in refused(hooked(), path)
    assert path.read_text() == "as before"


def hooked():
    tower = create_tower()
    tower.blocks[1].attn.qkv.register_forward_hook(lambda *args: None)
    return tower


def normed():
    tower = create_tower()
    weight_norm(tower.blocks[0].mlp.fc1)
    return tower


def replaced():
    class LoRA(nn.Linear):
        """A layer of another library."""

    tower = create_tower()
    tower.blocks[0].mlp.fc1 = LoRA(16, 64)
    return tower


@pytest.mark.parametrize(
    "tower, told",
    [
        (hooked, "blocks.1.attn.qkv (Linear) has hooks"),
        (normed, "blocks.0.mlp.fc1 (ParametrizedLinear) has hooks or is a layer of another library"),
        (replaced, "blocks.0.mlp.fc1 (LoRA) has hooks or is a layer of another library (LoRA, quantised)"),
        (lambda: create_tower().half(), "the tower has weights in torch.float16; try tower.float()"),
        (lambda: create_tower().double(), "the tower has weights in torch.float64; try tower.float()"),
        (lambda: create_tower().train(), "the tower is in training mode; try tower.eval()"),
    ],
)
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_towers_that_a_file_would_not_be_true_to_are_refused(tower, told, ending, tmp_path):
    assert told in refused(tower(), tmp_path / f"x.{ending}")


def test_a_pair_names_classes_and_folders_are_made_as_other_stages_make_them(pair, tmp_path):
    path = tmp_path / "deep" / "er" / "x.pt2"
    about = export_tower(pair, path, ["cat", "dog"], ["{}", "a photo of a {}."])
    assert os.listdir(path.parent) == ["x.pt2"] and read_archive(path) == about
    assert (about["classes"], about["templates"]) == (["cat", "dog"], ["{}", "a photo of a {}."])
    check_probabilities(path, pair, about["templates"])


@torch.no_grad()
def check_probabilities(path, pair, templates):
    images = images_of(3)
    found = CheckedFile(str(path)).run(images)[0]
    head = pair.zero_shot_head(["cat", "dog"], templates)
    expected = (pair.logit_scale.exp() * pair.encode_image(images) @ head.T).softmax(1)
    torch.testing.assert_close(found["probabilities"], expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_visual_prompts_go_along(tmp_path):
    tower = create_tower()
    tower.set_prompts(Prompts("V", 2, 16, 16))
    about = export_tower(tower, tmp_path / "x.pt2")
    assert about["weights"]["prompts"] == tower.prompts.sha256()
    check_equal(tower, str(tmp_path / "x.pt2"), batches=(1, 3))
