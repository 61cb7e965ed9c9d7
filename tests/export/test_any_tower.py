"""Files of towers that have no text tower: SigLIP, DINOv2 and classifiers, of timm and of transformers."""

import json

import pytest
import timm
import torch
from helpers import toy_hosts, toy_hub
from helpers.toy_exports import refused
from timm.models import save_for_hf
from torch.nn.functional import normalize

import patchrank
from patchrank.export.check import CheckedFile, probabilities_of
from patchrank.export.command import main
from patchrank.export.description import describe, fingerprints
from patchrank.export.program import ExportedTower, OwnClasses
from patchrank.export.towers import pair_of
from patchrank.export.write import export_tower, own_names
from patchrank.models.clip import create_clip
from patchrank.models.hosts.tower import SharedTower
from patchrank.models.pair import Clip
from patchrank.utils.errors import UserError

PRUNING = dict(keep_rate=0.5, locations=(2,), reducer="center", leftovers="merge")
FLAGS = "--keep-rate 0.5 --locations 2 --reducer center --leftovers merge".split()


def classifier_of(name="timm average"):
    """A classifier of timm as `create_clip` has it: a tower without a head, and the head beside it."""
    model = toy_hosts.create(name, depth=2)
    head = model.head
    model.reset_classifier(0)
    tower = SharedTower.around(model)
    tower.set_pruning(**PRUNING)
    return Clip("toy", tower, None, classifier=head).eval()


def write_folder(name, folder):
    """A folder of a model as its library writes it, and what `--model` calls it."""
    if name.startswith("timm"):
        model, settings = toy_hosts.create(name, depth=2), toy_hosts.OF_TIMM[name][1] | {"depth": 2}
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, toy_hosts.SIDE, toy_hosts.SIDE)}
        save_for_hf(model, folder, model_args=toy_hosts.TIMM | settings, safe_serialization=True)
        return f"local-dir:{folder}"
    pytest.importorskip("transformers")
    return toy_hub.write(toy_hub.create_any(name), folder)


@torch.inference_mode()
def test_a_classifier_gives_its_own_probabilities():
    clip, x = classifier_of(), toy_hosts.images()
    module = ExportedTower(clip, OwnClasses(clip.classifier)).eval()
    probabilities, embedding, _ = module(x)
    raw = clip.visual(x)
    torch.testing.assert_close(probabilities, clip.classifier(raw).softmax(-1))
    torch.testing.assert_close(embedding, normalize(raw, dim=-1))
    assert torch.equal(probabilities_of(clip, {"classes": ["a"]})(raw), probabilities)
    assert module.outputs == ["probabilities", "embedding", "kept"]


def test_classes_are_called_as_given_or_known_or_by_numbers():
    clip = classifier_of()
    assert own_names(clip, ()) == ("0", "1", "2", "3", "4") and list(own_names(clip, list("abcde"))) == list("abcde")
    clip.class_names = tuple("vwxyz")
    assert own_names(clip, ()) == tuple("vwxyz")
    with pytest.raises(UserError, match="2 classes are named, but the classifier of toy has 5; name all or none"):
        own_names(clip, ["a", "b"])


def test_a_file_knows_its_classifier():
    clip, other = classifier_of(), classifier_of()
    torch.nn.init.zeros_(other.classifier.weight)
    ours, theirs = fingerprints(clip, True), fingerprints(other, True)
    assert ours["text"] is None and ours["classifier"] != theirs["classifier"]
    assert {part for part in ours if ours[part] != theirs[part]} == {"classifier"}


def test_classes_need_text_or_a_classifier(tmp_path):
    tower = classifier_of().visual
    with pytest.raises(UserError, match="classes need a text tower or a classifier, which timm:vit_base.* has not"):
        export_tower(tower, tmp_path / "toy.pt2", classes=["a"])
    assert not list(tmp_path.iterdir())


def test_a_classifier_that_is_changed_is_refused(tmp_path):
    clip = classifier_of()
    clip.classifier.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=r"classifier \(Linear\) has hooks"):
        export_tower(clip, tmp_path / "toy.pt2")


def test_a_tower_alone_is_called_by_the_name_that_makes_it():
    model = timm.create_model("vit_base_patch16_siglip_224.webli", num_classes=0, **toy_hosts.TIMM)
    clip = pair_of(SharedTower.around(model))
    assert clip.name == "timm:vit_base_patch16_siglip_224.webli" and not clip.has_text
    assert describe(clip, ExportedTower(clip), "pt2")["settings"]["img_size"] == toy_hosts.SIDE


@pytest.mark.slow
def test_a_classifiers_folder_is_exported_and_checked(tmp_path, capsys):
    model, path = write_folder("timm average", tmp_path / "toy"), str(tmp_path / "toy.pt2")
    assert main(["--model", model, *FLAGS, "--out", path]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["classes"] == list("01234") and made["templates"] == [] and made["model"].startswith("local-dir:toy@")
    assert main(["--check", path, "--model", model, "--data", "digits", "--limit", "8"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["passed"] and row["same_class"] == 8 and row["drift_unpruned"] > 1e-6
    told = refused(["--check", path, "--data", "digits", "--limit", "8"], capsys)
    assert "a folder of somebody's own; try --model local-dir:FOLDER" in told


KINDS = ["timm siglip", "timm dinov2", "SiglipVisionModel", "Dinov2Model", "ViTForImageClassification", "SiglipModel"]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_tower_is_the_same_as_onnx(name, tmp_path, capsys):
    model, path, smaller = write_folder(name, tmp_path / "toy"), str(tmp_path / "t.onnx"), str(tmp_path / "t8.onnx")
    named = ["--classes", "cat", "dog", "--templates", "a photo of {}"] if name == "SiglipModel" else []
    assert main(["--model", model, *FLAGS, *named, "--out", path, "--int8", smaller]) == 0
    capsys.readouterr()
    assert main(["--check", path, smaller, "--model", model, "--data", "digits", "--limit", "8"]) == 0
    row, of_int8 = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["passed"] and row["embedding_apart"] < 1e-5 and row["same_kept"] == 8
    assert of_int8["drift"] < 0.05 and of_int8["bytes"] < row["bytes"]
    clip, x = create_clip(model, **PRUNING), toy_hosts.images(2)
    with torch.inference_mode():
        expected = clip.visual(x)
        found = CheckedFile(path).run(x)[0]
        torch.testing.assert_close(found["embedding"], normalize(expected, dim=-1), atol=1e-5, rtol=0)
        if name == "ViTForImageClassification":
            host = patchrank.prune(toy_hub.create_classifier(), **PRUNING)
            torch.testing.assert_close(found["probabilities"], host(x).logits.softmax(-1), atol=1e-5, rtol=0)
