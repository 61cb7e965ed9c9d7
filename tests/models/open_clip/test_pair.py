"""A pruned open_clip model in our stages, and open_clip models that are made with our towers."""

import io

import open_clip
import pytest
import torch
from helpers.tiny_open_clip import create, images_of, tokens
from open_clip.model import convert_weights_to_lp, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform, resolve_data_config

import patchrank
from patchrank.data.dataset_factory import load_split
from patchrank.fit import fit_predictor
from patchrank.golden.dataset import Ranked, read_ranked
from patchrank.golden.make_shards import make_shards, shard_folder
from patchrank.golden.scores import score_images
from patchrank.models.embed import evaluate
from patchrank.models.open_clip.pair import from_open_clip, text_tower
from patchrank.models.open_clip.prune import open_clip_configs
from patchrank.models.pretrained import WEIGHTS
from patchrank.models.text import encode_tokens, text_shape
from patchrank.utils.errors import UserError


@pytest.fixture(scope="module")
def configs():
    open_clip.add_model_config(open_clip_configs())


@pytest.fixture
def digits(configs, clip):
    """The embedded pair as an open_clip model, pruned by the predictor that ships."""
    model = open_clip.create_model("patchrank-digits").eval()
    state = {f"visual.trunk.{key}": value for key, value in clip.visual.state_dict().items()}
    state |= clip.text.state_dict() | {"logit_scale": clip.logit_scale.data}
    model.load_state_dict(state)
    predictor = WEIGHTS / "patchrank_clip_digits.predictor.safetensors"
    return patchrank.prune_open_clip(model, keep_rate=0.6, predictor_path=predictor)


@torch.no_grad()
@pytest.mark.parametrize(
    "text",
    [{}, {"proj_bias": True}, {"proj_type": "none"}, {"pool_type": "eos", "eos_id": 7}, {"no_causal_mask": True}],
)
@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_the_text_tower_is_the_models_own(kind, text):
    model, ids = create(model=kind, text=text, quick_gelu=True), tokens()
    tower = text_tower(model)
    assert torch.equal(tower(ids), model.encode_text(ids))
    torch.testing.assert_close(encode_tokens(tower, ids), model.encode_text(ids), atol=1e-5, rtol=1e-5)
    assert text_shape(tower) == (32, 2, 32, 16, 4.0) and tower.vocab_size == 100
    own = {id(p) for name, p in model.named_parameters() if not name.startswith(("visual.", "logit_scale"))}
    assert {id(p) for p in tower.parameters()} == own
    model.to(torch.float64)
    assert torch.equal(tower(ids), model.encode_text(ids))


@torch.no_grad()
def test_the_text_tower_in_open_clips_mixed_precision():
    model = create(cast_dtype=torch.bfloat16)
    convert_weights_to_lp(model, torch.bfloat16)
    assert torch.equal(text_tower(model)(tokens()), model.encode_text(tokens()))


def jpeg(mode, size):
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(3))
    file = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).convert(mode).save(file, "JPEG")
    return Image.open(file)


@pytest.mark.parametrize("mode, size", [("RGB", (77, 50)), ("L", (41, 90))])
@pytest.mark.parametrize(
    "cfg",
    [
        {"size": (32, 32)},
        {"size": (32, 32), "interpolation": "random", "mean": (0.5,) * 3, "std": (0.25,) * 3},
        {"size": (32, 32), "interpolation": "bilinear", "resize_mode": "squash"},
        {"size": (32, 48), "interpolation": "bilinear"},
    ],
)
def test_images_are_prepared_as_open_clip_does(mode, size, cfg):
    model, image = create(image_size=cfg["size"]), jpeg(mode, size)
    if len(cfg) > 1:  # otherwise as a model says that was made without open_clip's factory
        set_model_preprocess_cfg(model, {"mean": None, "std": None} | cfg)
    patchrank.prune_open_clip(model)
    ours = create_transform(**resolve_data_config(model=model.visual.trunk), is_training=False)
    theirs = image_transform_v2(PreprocessCfg(**cfg), is_train=False)
    assert torch.equal(ours(image.convert("RGB")), theirs(image))


def test_what_is_no_pair_is_refused():
    model = create()
    with pytest.raises(UserError, match="needs a model from prune_open_clip"):
        from_open_clip(model)
    patchrank.prune_open_clip(model)
    with pytest.raises(UserError, match="another vocabulary than CLIP"):
        from_open_clip(model)
    model.visual.trunk.pretrained_cfg["crop_mode"] = "border"
    with pytest.raises(UserError, match="resize_mode 'longest'"):
        from_open_clip(model, tokenizer=tokens)
    model = patchrank.prune_open_clip(create("timm", timm_proj="linear"))
    with pytest.raises(UserError, match="the projection inside the image tower"):
        from_open_clip(model, tokenizer=tokens)


@torch.no_grad()
def test_a_config_that_names_our_tower_is_our_pair(digits, clip):
    split = load_split("digits", "val", 12)
    pair = from_open_clip(digits, "digits")
    assert pair.sha256() == clip.sha256() and not pair.training
    assert pair.transform_settings() == clip.transform_settings()
    clip.visual.set_pruning(keep_rate=0.6, predictor_path=WEIGHTS / "patchrank_clip_digits.predictor.safetensors")
    ours, theirs = evaluate(pair, split, quiet=True), evaluate(clip, split, quiet=True)
    assert ours.row() == theirs.row() and (ours.kept == theirs.kept).all()
    names, tokenizer = list(split.classes), open_clip.get_tokenizer("patchrank-digits")
    head = open_clip.build_zero_shot_classifier(digits, tokenizer, names, list(split.templates))
    torch.testing.assert_close(head.T, pair.zero_shot_head(split.classes, split.templates), atol=1e-5, rtol=1e-5)


def test_a_config_that_names_our_tower_loads_its_checkpoints(digits):
    state = digits.state_dict()
    assert not any("pruner" in key for key in state)
    fresh = open_clip.create_model("patchrank-digits")
    fresh.load_state_dict(state)
    trunk = digits.visual.trunk.original[0]
    assert patchrank.unprune(digits).visual.trunk is trunk and trunk.pruner is None
    trunk.set_pruning(keep_rate=0.5, reducer="random")  # a tower of ours that is pruned before: what it had comes back
    patchrank.prune_open_clip(digits, keep_rate=0.25)
    assert digits.visual.trunk.pruning.reducer == "random" and sum(digits.visual.trunk.drop_counts) == 48
    assert patchrank.unprune(digits).visual.trunk is trunk and sum(trunk.drop_counts) == 32


def test_the_config_of_b16_is_openais_model(configs):
    with torch.device("meta"):
        model = open_clip.create_model("patchrank-ViT-B-16", device="meta")
        native = open_clip.create_model("ViT-B-16-quickgelu", device="meta")
    assert type(model.visual.trunk).__name__ == "PrunedVisionTransformer"
    acts = [model.visual.trunk.blocks[0].mlp.act, model.transformer.resblocks[0].mlp.gelu]
    assert [type(act).__name__ for act in acts] == ["QuickGELU"] * 2
    assert model.visual(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 512)
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items() if "visual" not in k} for m in (model, native))
    assert ours == theirs


def test_a_native_model_goes_through_all_stages():
    """Scoring, fitting and pruned inference of a random model that open_clip made."""
    model = patchrank.prune_open_clip(create(quick_gelu=True))
    tower, images = model.visual.trunk, torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    golden = score_images(tower, images)
    assert golden.scores.shape == (6, 1, 64)
    with torch.no_grad():
        x = tower.forward_prefix(images, 4)
    data = Ranked(x[:, 0], x[:, 1:], golden.scores[:, 0].float())
    predictor = fit_predictor(data, tower.patch_embed.grid_size, dim=8, epochs=3, quiet=True)
    tower.set_pruning(keep_rate=0.5, predictor=predictor)
    with torch.no_grad():
        out = tower.forward_pruned(images)
        assert torch.equal(model.encode_image(images), out.embedding)
    assert out.kept.shape == (6, 32)
    assert torch.equal(out.scores, predictor(data.cls, data.patches))


def test_a_native_model_goes_through_shards_and_evaluation(tmp_path):
    """As above with a text tower, images of a task, and shards on disk."""
    text = {"context_length": 77, "vocab_size": 49408}
    model = patchrank.prune_open_clip(create(text=text, quick_gelu=True))
    pair, split = from_open_clip(model, "mine"), load_split("digits", "val", 8)
    path = make_shards(
        pair, split, shard_folder(pair, split, str(tmp_path), window=2, stride=2, remove_at=4), quiet=True
    )
    data = read_ranked(pair, path, "label", 4, quiet=True)
    assert data.patches.shape == (8, 64, 64)
    predictor = fit_predictor(data, (8, 8), dim=8, epochs=2, quiet=True)
    model.visual.trunk.set_pruning(keep_rate=0.6, predictor=predictor)
    found = evaluate(pair, split, quiet=True)
    assert found.kept.shape == (8, 38) and {"accuracy", "agreement", "cosine"} <= set(found.row())
    images = images_of(model)
    with torch.no_grad():
        torch.testing.assert_close(pair.encode_image(images), model.encode_image(images, normalize=True))
    patchrank.unprune(model)
    fresh = patchrank.prune_open_clip(model)
    assert from_open_clip(fresh, "mine").sha256() == pair.sha256()
