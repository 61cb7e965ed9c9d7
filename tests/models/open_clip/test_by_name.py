"""Pairs that `open_clip:...` names: equal to open_clip's own, or refused in one line."""

import json
import re
import shutil

import open_clip
import pytest
import torch
from helpers import toy_hub
from helpers.open_clip_files import CONFIG, create_theirs, write_config, write_model
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors.torch import save_file

import patchrank
from patchrank.models.checkpoints import hub
from patchrank.models.model_name import stable_name
from patchrank.models.open_clip.by_name import find_config
from patchrank.utils.errors import UserError

WORDS = ["a photo of a cat", "a dog on a sofa, seen from above"]
TEXT, VISION = CONFIG["text_cfg"], CONFIG["vision_cfg"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": False, "custom_text": True},
        {"nonscalar_logit_scale": True, "vision_cfg": VISION | {"ls_init_value": 0.1, "no_ln_pre": True}},
        {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": None}},
    ],
    ids=["clip", "custom_text", "scaled", "timm"],
)
@torch.no_grad()
def test_embeddings_are_open_clips_own(tmp_path, images, changes):
    theirs = create_theirs(tmp_path, **changes)
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "toy.pt")
    clip = patchrank.create_clip(f"open_clip:{tmp_path}/toy.json", checkpoint=tmp_path / "toy.pt")
    if "timm_model_name" in changes.get("vision_cfg", ()):
        images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = theirs.encode_image(images, normalize=True)
    torch.testing.assert_close(clip.encode_image(images), expected, atol=1e-6, rtol=0)
    tokens = open_clip.get_tokenizer("toy")(WORDS)
    assert torch.equal(clip.tokenize(WORDS), tokens) and tokens.shape == (2, TEXT["context_length"])
    expected = theirs.encode_text(tokens, normalize=True)
    torch.testing.assert_close(clip.encode_text(WORDS), expected, atol=1e-6, rtol=0)
    assert clip.logit_scale.shape == () and float(clip.logit_scale) == float(theirs.logit_scale)


SIGLIP = {
    "embed_dim": 192,
    "init_logit_bias": -10,
    "custom_text": True,
    "quick_gelu": False,
    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": dict(width=192, heads=3, layers=1, context_length=12, no_causal_mask=True, proj_bias=True)
    | dict(pool_type="last", norm_kwargs={"eps": 1e-6}, tokenizer_kwargs={"clean": "canonicalize"}),
}


def check_siglip(folder, settings, texts):
    """A SigLIP of a config, beside open_clip's own model, its tokenizer a folder."""
    pytest.importorskip("transformers")
    toy_hub.tokenizer().save_pretrained(folder / "words")
    text = settings["text_cfg"] | {"hf_tokenizer_name": str(folder / "words"), "vocab_size": len(toy_hub.tokenizer())}
    theirs = create_theirs(folder, **settings | {"text_cfg": text})
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, folder / "toy.safetensors")
    clip = patchrank.create_clip(f"open_clip:{folder}/toy.json", checkpoint=folder / "toy.safetensors")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = theirs.encode_image(images, normalize=True)
    torch.testing.assert_close(clip.encode_image(images), expected, atol=1e-5, rtol=0)
    tokens = open_clip.get_tokenizer("toy")(texts)
    assert torch.equal(clip.tokenize(texts), tokens)
    expected = theirs.encode_text(tokens, normalize=True)
    torch.testing.assert_close(clip.encode_text(texts), expected, atol=1e-6, rtol=0)
    logits = clip.encode_image(images) @ clip.encode_text(texts).T * clip.logit_scale.exp()
    logits = logits + theirs.logit_bias  # one number for all, so that it changes no answer
    torch.testing.assert_close(logits, theirs.get_logits(images, tokens)[0], atol=1e-3, rtol=0)
    assert clip.logit_scale.shape == ()
    return clip


@torch.no_grad()
def test_a_siglip_is_open_clips_own_with_its_text_tower(tmp_path):
    clip = check_siglip(tmp_path, SIGLIP, ["a photo of a cat", "A dog, on a SOFA!"])
    assert torch.equal(clip.tokenize(["A Dog!"]), clip.tokenize(["a dog"]))
    assert clip.zero_shot_head(["cat", "dog"], ["a photo of a {}."]).shape == (2, 192)
    clip.visual.set_pruning(keep_rate=0.5, locations=(4,), reducer="center")
    assert clip.visual.drop_counts == (98,)


@pytest.mark.slow
@torch.no_grad()
def test_so_is_one_of_full_size(tmp_path):
    check_siglip(tmp_path, open_clip.get_model_config("ViT-B-16-SigLIP"), ["a photo of a cat", "the dog"])


def test_images_are_prepared_as_the_config_says(files, tmp_path):
    image = Image.effect_noise((50, 70), 64).convert("RGB")
    cfg = {"mean": [0.5] * 3, "std": [0.25, 0.2, 0.2], "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "hub.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": cfg | {"size": 224}}))
    for name, stated in ((files[0], {}), (f"open_clip:{tmp_path}/hub.json", cfg)):
        theirs = image_transform_v2(open_clip.transform.PreprocessCfg(size=32, **stated), is_train=False)
        assert torch.equal(patchrank.create_clip(name, checkpoint=files[1]).transform()(image), theirs(image))


@torch.no_grad()
def test_pruning_settings_are_those_of_our_entries(files, images):
    name, checkpoint = files
    clip = patchrank.create_clip(name, checkpoint=checkpoint)
    assert clip.visual.pruner is None and clip.visual.pruning.locations == (2,)  # of the usual ones, (2,) is there
    pruned = patchrank.create_clip(name, checkpoint=checkpoint, keep_rate=0.5, locations=(1,), reducer="center")
    assert pruned.visual.drop_counts == (8,) and pruned.sha256() == clip.sha256()
    clip.visual.set_pruning(keep_rate=0.5, locations=(1,), reducer="center")
    assert torch.equal(clip.visual(images), pruned.visual(images))
    with pytest.raises(UserError, match="'predictor' has no weights to rank by: give predictor_path"):
        patchrank.create_clip(name, checkpoint=checkpoint, keep_rate=0.5, locations=(1,))
    with pytest.raises(UserError, match="key 'keep_rat' does not exist; did you mean 'keep_rate'"):
        patchrank.create_clip(name, checkpoint=checkpoint, keep_rat=0.5)
    ready = patchrank.create_clip(name, False, keep_rate=0.5, locations=(1,), predictor_init="random")
    assert ready.visual.pruner.reducer.fitted


def test_names_are_independent_of_folders_and_say_the_content(files, tmp_path):
    shutil.copy(files[0].removeprefix("open_clip:"), tmp_path / "toy.json")
    moved = f"open_clip:{tmp_path}/toy.json"
    clips = [patchrank.create_clip(name, checkpoint=files[1]) for name in (files[0], moved)]
    assert clips[0].name == clips[1].name == stable_name(moved) and clips[0].name.startswith("open_clip:toy@")
    assert clips[0].sha256() == clips[1].sha256()
    other = write_config(tmp_path / "other/toy.json", vision_cfg=VISION | {"head_width": 16})  # weights do not show it
    assert stable_name(other) != stable_name(moved)
    assert stable_name("open_clip:ViT-B-16/openai") == "open_clip:ViT-B-16/openai"


MODELS = [
    ("open_clip:", "model 'open_clip:': names no model; try open_clip:CONFIG.json, open_clip:NAME or open_clip:NAME/"),
    ("open_clip:ViT-B-61", "knows no such config, and a config's file ends in .json; try open_clip:ViT-B-16"),
    ("open_clip:zzz", "try one of open_clip.list_models()"),
    ("open_clip:ViT-B/16", "try open_clip:ViT-B-16"),
    ("open_clip:ViT-B-16/opnai", "knows no such tag; did you mean 'openai'"),
    ("open_clip:ViT-B-16/openai", "trained with quick GELU; try open_clip:ViT-B-16-quickgelu/openai"),
    ("open_clip:ViT-B-16", "names no weights; try --checkpoint FILE, or a tag, as in open_clip:ViT-B-16/openai"),
    ("open_clip:nowhere/toy.json", "model open_clip:nowhere/toy.json: there is no such file"),
    ("tf:vit_base", "there are no models of the kind 'tf:'; try an entry of ours, such as patchrank_clip_b16, or timm"),
]


@pytest.mark.parametrize("name, message", MODELS)
def test_what_no_model_is_named_by(name, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        patchrank.create_clip(name)
    assert "\n" not in str(caught.value)


CONTENTS = [
    ("{", "is not JSON"),
    ("[1]", "is no config of open_clip, which has embed_dim, vision_cfg, text_cfg, but 'embed_dim' is missing"),
    ({"embed_dim": 8, "vision_cfg": {}}, "but 'text_cfg' is missing"),
    ({"model_cfg": CONFIG, "preprocess_cfg": 3}, "preprocess_cfg must hold a mapping, but holds int"),
    (CONFIG | {"embed_dims": 8}, "key 'embed_dims' does not exist in open_clip's configs; did you mean 'embed_dim'"),
    (CONFIG | {"vision_cfg": [12]}, "vision_cfg must hold a mapping"),
    (CONFIG | {"vision_cfg": VISION | {"widht": 8}}, "key 'vision_cfg.widht' does not exist .* did you mean 'width'"),
    (CONFIG | {"vision_cfg": VISION | {"width": "big"}}, "open_clip cannot make it"),
    (CONFIG | {"vision_cfg": VISION | {"attentional_pool": True}}, "its image tower has attentional pooling, which"),
    (CONFIG | {"vision_cfg": VISION | {"layers": [1, 1, 1, 1]}}, "its image tower has ModifiedResNet"),
    (CONFIG | {"vision_cfg": {"timm_model_name": "no_such"}}, r"open_clip cannot make it \(Unknown model"),
    (CONFIG | {"text_cfg": {"hf_model_name": "roberta-base"}}, "hf_model_name asks for a text tower of Hugging Face"),
    (CONFIG | {"text_cfg": TEXT | {"vocab_size": 100}}, "vocab_size is 100, not the 49408 of CLIP's tokenizer"),
    (CONFIG | {"text_cfg": TEXT | {"hf_tokenizer_name": "no/such"}}, "tokenizer_name: weights no/such are not in the"),
    (CONFIG | {"text_cfg": TEXT | {"tokenizer_kwargs": {"trust_remote_code": True}}}, "would run a stranger's code"),
    (CONFIG | {"text_cfg": TEXT | {"output_tokens": True}}, "text_cfg.output_tokens is for captioning; try false"),
    (CONFIG | {"multimodal_cfg": {}}, "multimodal_cfg makes it a CoCa"),
]


@pytest.mark.parametrize("content, message", CONTENTS, ids=range(len(CONTENTS)))
def test_what_is_no_config_or_none_that_ours_can_reproduce(tmp_path, content, message):
    (tmp_path / "toy.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=f"^model open_clip:{tmp_path}/toy.json: .*{message}") as caught:
        patchrank.create_clip(f"open_clip:{tmp_path}/toy.json", pretrained=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision_cfg": VISION | {"width": 32}}, "width 64, patch 8, 2 layers, .* but this tower has width 32"),
        ({"vision_cfg": VISION | {"image_size": 64}}, "image_size 32 in its config would fit"),
        (
            {"vision_cfg": VISION | {"mlp_ratio": 2}},
            r"visual.transformer.resblocks.0.mlp.c_fc.bias has shape \(256,\), not \(128,\)",
        ),
        ({"text_cfg": TEXT | {"layers": 2}}, "text tower: transformer.resblocks.1.attn.in_proj_bias is missing"),
    ],
    ids=["width", "size", "mlp", "text"],
)
def test_weights_of_another_config_are_refused_by_open_clips_names(files, tmp_path, changes, message):
    with pytest.raises(UserError, match=f"^checkpoint {files[1]}: .*{message}") as caught:
        patchrank.create_clip(write_config(tmp_path / "toy.json", **changes), checkpoint=files[1])
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_named_or_not_there(files, tmp_path):
    with pytest.raises(UserError, match="names no weights; try --checkpoint FILE$"):
        patchrank.create_clip(files[0])
    with pytest.raises(UserError, match="checkpoint nowhere.pt: there is no such file"):
        patchrank.create_clip(files[0], checkpoint="nowhere.pt")
    with pytest.raises(UserError, match="img_size is for entries of ours; try image_size in the config's vision_cfg"):
        patchrank.create_clip(*files[:1], checkpoint=files[1], img_size=64)


def test_tags_bring_weights_from_the_hub_and_their_own_images(monkeypatch, files):
    assert find_config("open_clip:ViT-B-16-quickgelu/openai").weights == ("ViT-B-16-quickgelu", "openai")
    asked = []
    monkeypatch.setattr(hub, "ensure_reachable", lambda repo, files: asked.append((repo, *files)))
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name: files[1])
    small = CONFIG | {"quick_gelu": False}
    monkeypatch.setattr("patchrank.models.open_clip.by_name.get_model_config", lambda name: small)
    clip = patchrank.create_clip("open_clip:ViT-B-16/datacomp_xl_s13b_b90k")
    assert clip.name == "open_clip:ViT-B-16/datacomp_xl_s13b_b90k"
    assert asked == [("laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", *hub.OPEN_CLIP_FILES)]
