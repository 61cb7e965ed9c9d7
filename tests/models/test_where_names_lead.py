"""Where names lead: to weights of hubs, to folders wherever they lie, to towers that were saved, or nowhere."""

import json
import re
import shutil

import pytest
import timm
import torch
from helpers import toy_hosts, toy_hub
from safetensors.torch import save_file
from timm.models import save_for_hf

import patchrank
from patchrank.models import from_timm
from patchrank.models.checkpoints import hub
from patchrank.models.classifier import classifier_on
from patchrank.models.clip import create_clip, create_tower
from patchrank.models.model_name import stable_name, with_absolute_path
from patchrank.utils.errors import UserError

SMALL = dict(img_size=28, patch_size=14, embed_dim=32, depth=3, num_heads=4)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """The folder of a toy SigLIP of transformers."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hub") / "siglip"
    toy_hub.write(toy_hub.create_pair("SiglipModel"), folder)
    return folder


@torch.no_grad()
def test_timms_names_bring_timms_weights(monkeypatch, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit").eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(from_timm, "download_file", lambda *what: asked.append(what) or tmp_path / "model.safetensors")
    clip = create_clip("timm:test_vit.r160_in1k", reducer="center", keep_rate=0.5, locations=(2, 3))
    x = torch.randn(1, 3, 160, 160)
    assert clip.name == "timm:test_vit.r160_in1k"
    assert asked[0][0] == "timm/test_vit.r160_in1k" and asked[0][1][0] == "model.safetensors"
    torch.testing.assert_close(clip.classifier(clip.visual.forward_whole(x)), theirs(x), atol=1e-5, rtol=0)
    assert clip.visual.drop_counts == (25, 25) and create_tower("timm:test_vit").num_classes == 0
    resized = create_clip("timm:test_vit", img_size=96)
    assert resized.visual.num_patches == 36 and resized.transform_settings()["input_size"] == [3, 96, 96]


@torch.no_grad()
def test_a_checkpoint_decides_on_the_number_of_classes(tmp_path):
    few = timm.create_model("test_vit", num_classes=7).eval()
    save_file(few.state_dict(), tmp_path / "few.safetensors")
    clip = create_clip("timm:test_vit", checkpoint=tmp_path / "few.safetensors")
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(clip.classifier(clip.visual(x)), few(x))
    none = {key: value for key, value in few.state_dict().items() if not key.startswith("head.")}
    save_file(none, tmp_path / "none.safetensors")
    assert create_clip("timm:test_vit", checkpoint=tmp_path / "none.safetensors").classifier is None


@torch.no_grad()
def test_an_entry_timms_name_and_a_pruned_model_are_one_tower_to_predictors(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("deit_small_patch16_224", **SMALL).eval()
    save_file(theirs.state_dict(), tmp_path / "deit.safetensors")
    save_for_hf(theirs, str(tmp_path / "folder"), model_args=SMALL, safe_serialization=True)
    names = "patchrank_deit_s16", "timm:deit_small_patch16_224", f"local-dir:{tmp_path}/folder"
    clips = [create_clip(name, checkpoint=tmp_path / "deit.safetensors", locations=(2,), **SMALL) for name in names]
    assert len({clip.sha256() for clip in clips}) == 1
    host = patchrank.find_tower(patchrank.prune(theirs, locations=(2,)))
    assert {clip.visual.blocks_sha256() for clip in clips} == {host.blocks_sha256()}
    assert all(clip.classifier.out_features == 1000 and clip.visual.num_classes == 0 for clip in clips)
    with classifier_on(clips[0]) as tower:
        x = torch.randn(1, 3, 28, 28)
        assert torch.equal(tower(x), patchrank.unprune(theirs)(x))
    assert clips[0].visual.num_classes == 0


def test_classes_are_called_as_the_models_record_says(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(from_timm, "download_file", lambda *_: tmp_path / "model.safetensors")
    assert create_clip("timm:test_vit").class_names[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    own = create_clip("timm:test_vit", checkpoint=tmp_path / "model.safetensors")
    assert own.class_names == ()  # a thousand classes of somebody's may be others
    few = timm.create_model("test_vit", num_classes=2)
    names = {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "cat"}}
    save_for_hf(few, str(tmp_path / "few"), model_config=names, safe_serialization=True)
    assert create_clip(f"local-dir:{tmp_path}/few").class_names == ("cat", "n2")
    pytest.importorskip("transformers")
    vit = toy_hub.create_classifier()
    assert create_clip(toy_hub.write(vit, tmp_path / "vit")).class_names == ()
    vit.config.id2label = {place: f"kind {place}" for place in range(5)}
    assert create_clip(toy_hub.write(vit, tmp_path / "named")).class_names[4] == "kind 4"


def test_the_projection_of_a_clip_is_no_classifier():
    kinds = {tag: timm.create_model("vit_base_patch16_clip_224", num_classes=classes, **SMALL) for tag, classes in
             (("openai", 512), ("ft_in1k", 1000), ("ft_in12k", 11821))}  # fmt: skip
    assert [from_timm.split_classifier(model) is None for model in kinds.values()] == [True, False, False]
    assert from_timm.split_classifier(timm.create_model("patchrank_clip_digits")) is None


@pytest.mark.parametrize("entry", ["patchrank_siglip_b16_224", "patchrank_deit_s16"])
@torch.no_grad()
def test_a_saved_tower_comes_back_with_its_pruning_and_predictor(tmp_path, entry):
    torch.manual_seed(0)
    pruning = dict(locations=(2,), keep_rate=0.5, reducer="predictor", predictor_init="random")
    tower, x = timm.create_model(entry, **SMALL, **pruning).eval(), torch.randn(2, 3, 28, 28)
    for weight in tower.pruner.parameters():
        weight.add_(torch.randn_like(weight))
    patchrank.save_pretrained(tower, tmp_path / "saved")
    name = f"local-dir:{tmp_path}/saved"
    assert torch.equal(timm.create_model(name, pretrained=True).eval()(x), tower(x))
    clip = create_clip(name)
    embedding = clip.visual(x)
    assert torch.equal(embedding if clip.classifier is None else clip.classifier(embedding), tower(x))
    assert create_clip(name, keep_rate=0.75).visual.drop_counts == (1,)
    assert create_clip(name, keep_rate=1.0).visual.pruner is None
    assert create_tower(name).drop_counts == ()
    tower.set_pruning(drop_counts=(3,))
    patchrank.save_pretrained(tower, tmp_path / "saved")
    assert create_clip(name).visual.drop_counts == (3,)  # which would win over a keep rate beside it
    assert create_clip(name, keep_rate=0.75).visual.drop_counts == (1,)
    save_file({"stranger": torch.ones(1), **tower.state_dict()}, tmp_path / "saved/model.safetensors")
    with pytest.raises(UserError, match="saved/model.safetensors: stranger is surplus"):
        create_clip(name)


def test_folders_are_called_by_what_they_say_and_not_by_where_they_are(siglip, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere/siglip"
    shutil.copytree(siglip, moved)
    name = stable_name(f"hf:{moved}")
    assert name == stable_name(f"hf:{siglip}") and re.fullmatch("hf:siglip@[0-9a-f]{8}", name)
    monkeypatch.chdir(moved.parent)
    assert with_absolute_path("hf:siglip") == f"hf:{moved}" and stable_name("hf:siglip/") == name
    assert with_absolute_path("local-dir:siglip") == f"local-dir:{moved}"
    for kept in ("hf:google/siglip-base-patch16-224", "timm:vit_tiny_patch16_224", "patchrank_clip_b16"):
        assert with_absolute_path(kept) == stable_name(kept) == kept
    for file, change in (("config.json", {"logit": 1}), ("preprocessor_config.json", {"resample": 2})):
        before = (moved / file).read_text()
        (moved / file).write_text(json.dumps(json.loads(before) | change))
        assert stable_name(f"hf:{moved}") != name
        (moved / file).write_text(json.dumps(json.loads(before)))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    assert stable_name(f"hf:{moved}") == name


@torch.no_grad()
def test_repositories_are_read_as_folders(siglip, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "ensure_reachable", lambda repo, files, whole: asked.append(files))
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **how: asked.append((repo, how)) or str(siglip))
    clip = create_clip("hf:google/toy@main")
    assert clip.name == "hf:google/toy@main" and clip.sha256() == create_clip(f"hf:{siglip}").sha256()
    assert asked[1][0] == "google/toy" and asked[1][1]["revision"] == "main"
    assert "model*.safetensors" in asked[1][1]["allow_patterns"]
    create_tower("hf:google/toy")
    assert asked[2] == ("config.json",) and "model*.safetensors" not in asked[3][1]["allow_patterns"]


@torch.no_grad()
def test_folders_of_timm_go_timms_way(tmp_path):
    pytest.importorskip("transformers")
    model, x = toy_hosts.create("timm siglip"), toy_hosts.images()
    entry, settings = toy_hosts.OF_TIMM["timm siglip"]
    save_for_hf(model, str(tmp_path / "toy"), model_args=toy_hosts.TIMM | settings, safe_serialization=True)
    clip = create_clip(f"hf:{tmp_path}/toy")
    assert torch.equal(clip.visual(x), model(x)) and clip.name.startswith("hf:toy@")
    with torch.device("meta"):
        assert create_tower(f"hf:{tmp_path}/toy").num_patches == toy_hosts.NUM_PATCHES


@pytest.mark.slow
@torch.no_grad()
def test_models_of_full_size_are_what_they_are(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_base_patch16_siglip_224").eval()
    save_file(theirs.state_dict(), tmp_path / "siglip.safetensors")
    x = torch.randn(2, 3, 224, 224)
    for name in ("timm:vit_base_patch16_siglip_224", "patchrank_siglip_b16_224"):
        assert torch.equal(create_clip(name, checkpoint=tmp_path / "siglip.safetensors").visual(x), theirs(x))
    dino = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, patch_size=14)).eval()
    dino.save_pretrained(tmp_path / "dino")
    clip = create_clip(f"hf:{tmp_path}/dino")  # which says nothing of images: 224 pixels are its class's own
    assert clip.visual.num_patches == 256 and clip.transform_settings()["crop_pct"] == 224 / 256
    torch.testing.assert_close(clip.visual(x), dino(x).pooler_output, atol=1e-5, rtol=1e-5)
    clip.visual.set_pruning(keep_rate=0.6, reducer="center")
    host = patchrank.find_tower(patchrank.prune(dino, img_size=224, keep_rate=0.6, reducer="center"))
    assert host.blocks_sha256() == clip.visual.blocks_sha256()
    torch.testing.assert_close(clip.visual(x), host(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pickles_are_read_by_the_guarded_reader_alone(siglip, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(siglip, folder)
    (folder / "model.safetensors").unlink()
    model = toy_hub.create_pair("SiglipModel")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert create_clip(f"hf:{folder}").sha256() == create_clip(f"hf:{siglip}").sha256()
    torch.save({"model": print}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="a pickle that asks for print, which is no tensor: refused"):
        create_clip(f"hf:{folder}")


NAMES = [
    ("timm:", "timm has no such model; try one of timm.list_models('vit_*')"),
    ("timm:vit_base_patch16_siglip_225", "timm has no such model; did you mean timm:vit_base_patch16_siglip_"),
    ("timm:vit_base_patch16_224.nope", "timm knows no such tag; did you mean 'vit_base_patch16_224."),
    ("timm:patchrank_vit_b16", "is an entry of ours; try patchrank_vit_b16"),
    ("timm:vit_tiny_patch16_224", "weights timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k are not in the cache"),
    ("timm:vit_base_patch16_gap_224", "its weights are not on the hub; try --checkpoint FILE, or another tag"),
    ("patchrank_vit_b16.nope", "timm knows no such tag; did you mean 'patchrank_vit_b16."),
    ("patchrank_vit_b61", "did you mean 'patchrank_vit_b16'? known: patchrank_clip_b16, "),
    ("patchrank_vit_b61", "; or timm:NAME, hf:REPO_OR_FOLDER, local-dir:FOLDER, open_clip:CONFIG.json"),
    ("hf:", "names no model; try hf:REPO or hf:FOLDER"),
    ("hf:google/siglip", "weights google/siglip are not in the cache"),
    ("hf:google/siglip", "give a folder that is here, or run `hf download google/siglip` on a machine with a network"),
    ("hf:./nowhere", "there is no such folder; try hf:FOLDER"),
    ("hf:s3://bucket/siglip", "must be a folder of this machine"),
    ("local-dir:", "there is no such folder; try local-dir:FOLDER"),
    ("local-dir:runs/nowhere", "there is no such folder"),
]


@pytest.mark.parametrize("name, message", NAMES)
def test_what_no_model_is_named_by(name, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        create_clip(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch16_dinov3", "naflexvit_base_patch16_gap"])
def test_other_models_of_timm_are_refused_by_their_class(name):
    with torch.device("meta"), pytest.raises(UserError, match=f"timm:{name}: patchrank takes timm's VisionTransformer"):
        create_tower(f"timm:{name}")


FOLDERS = [
    ("{", "config.json: is not JSON"),
    ("[1]", "config.json must hold a mapping, but holds list"),
    ({}, "its config names no model, which patchrank does not take; it takes CLIPModel, CLIPVisionModel, SiglipModel"),
    ({"architectures": "CLIPModel"}, "its config names no model, which"),
    ({"architectures": ["BertModel"]}, "its config names BertModel, which"),
    ({"architectures": ["Dinov2ForImageClassification"]}, "its config names Dinov2ForImageClassification, which"),
    ({"model_type": "swin"}, "its config names swin, which"),
    ({"model_type": "vit", "hidden_size": "big"}, "transformers cannot make it"),
    ({"model_type": "siglip_vision_model", "num_hidden_layers": 1, "vision_use_head": False}, "gives no embedding"),
    ({"architecture": "resnet18"}, "timm's VisionTransformer, but got timm's ResNet"),
    ({"architecture": "no_such"}, "timm cannot make it (Unknown model (no_such))"),
]


@pytest.mark.parametrize("content, message", FOLDERS, ids=range(len(FOLDERS)))
def test_what_is_no_model_that_ours_can_reproduce(tmp_path, content, message):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=f"^model hf:{tmp_path}: .*{re.escape(message)}") as caught:
        create_clip(f"hf:{tmp_path}", pretrained=False)
    assert "\n" not in str(caught.value)


def test_open_clips_files_may_lie_beside_and_transformers_may_be_missing(siglip, tmp_path, monkeypatch):
    folder = tmp_path / "both"
    shutil.copytree(siglip, folder)
    save_file({"visual.proj": torch.ones(2, 2)}, folder / "open_clip_model.safetensors")
    assert create_clip(f"hf:{folder}").sha256() == create_clip(f"hf:{siglip}").sha256()
    monkeypatch.setattr("patchrank.models.clip.find_spec", lambda _: None)
    for create in (create_clip, create_tower):
        with pytest.raises(UserError, match="transformers is missing; try pip install 'transformers>=5'"):
            create(f"hf:{siglip}")


def test_folders_that_lack_something(siglip, tmp_path):
    with pytest.raises(UserError, match="config.json: there is no such file"):
        create_clip(f"hf:{tmp_path}")
    with pytest.raises(UserError, match=f"config.json names no architecture of timm's; try hf:{siglip}"):
        create_clip(f"local-dir:{siglip}")
    folder = tmp_path / "siglip"
    shutil.copytree(siglip, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="its tokenizer cannot be had .*; try a folder with a tokenizer.json") as caught:
        create_clip(f"hf:{folder}")
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is a folder with none of .*model.safetensors"):
        create_clip(f"hf:{folder}")


@pytest.mark.parametrize("size", [0, 5, 2.5])
def test_image_sizes_that_are_none(siglip, size):
    for name in (f"hf:{siglip}", "timm:test_vit"):
        with pytest.raises(UserError, match="img_size"):
            create_clip(name, pretrained=False, img_size=size)
