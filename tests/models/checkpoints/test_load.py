"""Weights from files of every format and layout, into our towers; what does not fit is named and not loaded."""

from functools import partial

import open_clip
import pytest
import timm
import torch
from helpers.tiny_clip import FORMATS, LAYOUTS, by_timm, create_pair, create_theirs, create_tower, hugging_face
from timm.layers import LayerNorm
from torch import nn

from patchrank.models.checkpoints.filter import checkpoint_filter_fn, tower_weights
from patchrank.models.checkpoints.key_maps import to_pair
from patchrank.models.checkpoints.load import load_pair, load_tower, read_checkpoint
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.utils.errors import UserError


@pytest.fixture(scope="module")
def theirs():
    return create_theirs()


@torch.no_grad()
def assert_same_pair(clip, theirs):
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 99, (3, 16))
    torch.testing.assert_close(clip.visual(images), theirs.encode_image(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clip.text(tokens), theirs.encode_text(tokens), atol=1e-5, rtol=1e-5)
    expected = by_timm(theirs.state_dict())
    assert all(torch.equal(value, expected[key]) for key, value in clip.visual.state_dict().items())
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in clip.text.state_dict().items())
    assert torch.equal(clip.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_their_embeddings(theirs, tmp_path, layout):
    torch.save(LAYOUTS[layout](theirs.state_dict()), tmp_path / "weights")
    clip = create_pair()
    load_pair(clip, tmp_path / "weights")
    assert_same_pair(clip, theirs)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_formats_are_told_apart_by_content(theirs, tmp_path, form, name):
    state = theirs.state_dict()
    FORMATS[form](state, tmp_path / name)
    read = read_checkpoint(tmp_path / name)
    assert set(read) == set(state) and all(torch.equal(read[key], state[key]) for key in state)
    clip = create_pair()
    load_pair(clip, tmp_path / name)
    assert_same_pair(clip, theirs)


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_urls_are_read_as_well(theirs, tmp_path, form):
    import fsspec

    FORMATS[form](theirs.state_dict(), tmp_path / "w")
    with fsspec.open("memory://weights/w", "wb") as file:
        file.write((tmp_path / "w").read_bytes())
    read = read_checkpoint("memory://weights/w")
    assert all(torch.equal(read[key], value) for key, value in theirs.state_dict().items())


@torch.no_grad()
def test_the_activation_cannot_be_seen_in_weights(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    tower, images = create_tower(act_layer="gelu"), torch.randn(2, 3, 32, 32)
    load_tower(tower, tmp_path / "w.pt")
    assert (tower(images) - theirs.encode_image(images)).abs().max() > 1e-3


def test_a_tower_alone_is_no_pair(theirs, tmp_path):
    image_only = {k: v for k, v in hugging_face(theirs.state_dict()).items() if k.startswith(("vision", "visual"))}
    for name, layout in (("hugging_face", image_only), ("timm", by_timm(theirs.state_dict()))):
        torch.save(layout, tmp_path / name)
        tower, images = create_tower(), torch.randn(2, 3, 32, 32)
        load_tower(tower, tmp_path / name)
        torch.testing.assert_close(tower(images), theirs.encode_image(images), atol=1e-5, rtol=1e-5)
        with pytest.raises(UserError, match=f"{name}: holds an image tower alone"):
            load_pair(create_pair(), tmp_path / name)


def edited(state, **changes):
    return {key: value for key, value in (state | changes).items() if value is not None}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"visual.ln_post.bias": None}, "norm.bias is missing"),
        ({"visual.ln_post.bias": None, "ln_final.bias": None}, "norm.bias is missing"),
        ({"visual.extra": torch.ones(2), "spare": torch.ones(1)}, "extra is surplus, and 1 more"),
        ({"visual.ln_pre.weight": torch.ones(3)}, r"norm_pre.weight has shape \(3,\), not \(64,\)"),
        ({"visual.ln_pre.weight": torch.ones(64).char()}, "norm_pre.weight is of torch.int8, not torch.float32"),
        ({"ln_final.weight": None}, "text tower: ln_final.weight is missing"),
        ({"transformer.resblocks.9.ln_1.bias": torch.ones(1)}, "text tower: transformer.resblocks.9.ln_1.bias is surp"),
        ({"positional_embedding": torch.ones(77, 32)}, r"positional_embedding has shape \(77, 32\), not \(16, 32\)"),
        ({"logit_scale": None}, "logit_scale is missing"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale has shape \(2,\), not \(\)"),
        ({"visual.proj": None}, "head.bias is missing, and 1 more"),
    ],
)
def test_the_first_key_that_is_off_is_named_and_nothing_is_loaded(theirs, tmp_path, change, message):
    torch.save(edited(theirs.state_dict(), **change), tmp_path / "w.pt")
    clip = create_pair()
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_pair(clip, tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in clip.state_dict().items())


def empty(name):
    """An entry's tower without content."""
    with torch.device("meta"):
        return timm.create_model(name)


def shaped(name):
    """Weights of an entry's shape that take no room."""
    return {key: torch.zeros(()).expand(value.shape) for key, value in empty(name).state_dict().items()}


def test_another_architecture_is_described_and_its_entry_named(theirs, tower, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(UserError, match="width 64, patch 8, 2 layers, grid 4 x 4, 24 outputs, but patchrank_clip_dig"):
        load_tower(tower, tmp_path / "tiny.pt")
    torch.save(shaped("patchrank_clip_b16"), tmp_path / "b16.pt")
    with pytest.raises(UserError, match="grid 14 x 14, 512 outputs, but .* grid 8 x 8, .*; patchrank_clip_b16.* would"):
        load_tower(tower, tmp_path / "b16.pt")
    for theirs, ours, said in [("b32", "b16", "grid 7 x 7"), ("l14", "b16", "24 layers"), ("b16", "b32", "patch 16")]:
        with pytest.raises(
            UserError, match=f"w.pt: .*{said}.* but patchrank_clip_{ours} .*; patchrank_clip_{theirs}.* w"
        ):
            tower_weights(shaped(f"patchrank_clip_{theirs}"), empty(f"patchrank_clip_{ours}"), "w.pt")
    with pytest.raises(UserError, match="none of our entries would fit"):
        load_tower(create_tower(depth=3), tmp_path / "tiny.pt")


def test_through_timms_builder(theirs):
    """Text, masks and temperature are dropped, strictness stays, and what timm adapts it may adapt."""
    from safetensors.torch import load_file

    from patchrank.models.pretrained import WEIGHTS

    pair = load_file(WEIGHTS / "patchrank_clip_digits.safetensors")
    make = partial(timm.create_model, "patchrank_clip_digits", pretrained=True)
    changes = (({"visual.norm.bias": None}, "norm.bias is missing"), ({"visual.x": torch.ones(1)}, "x is surplus"))
    for change, message in changes:
        overlay = {"state_dict": edited(pair, **change)}
        for adapted in ({}, {"num_classes": 5}):  # where timm would no longer be strict
            with pytest.raises(UserError, match=message):
                make(pretrained_cfg_overlay=overlay, **adapted)
    with pytest.raises(UserError, match="grid 4 x 4"):
        make(pretrained_cfg_overlay={"state_dict": theirs.state_dict()})
    assert make(num_classes=5).head.weight.shape == (5, 64)
    assert make(in_chans=1).patch_embed.proj.weight.shape == (64, 1, 8, 8)


def test_positions_are_resampled_only_where_another_image_size_was_asked_for(tmp_path):
    small = timm.create_model("patchrank_clip_digits")
    torch.save(small.state_dict(), tmp_path / "64.pt")
    large = timm.create_model("patchrank_clip_digits", img_size=96)
    load_tower(large, tmp_path / "64.pt")
    assert large.pos_embed.shape == (1, 145, 64)
    torch.testing.assert_close(large.pos_embed[:, 0], small.pos_embed[:, 0])
    torch.save(large.state_dict(), tmp_path / "96.pt")
    with pytest.raises(UserError, match="grid 12 x 12"):
        load_tower(small, tmp_path / "96.pt")


def test_predictors_of_checkpoints(tmp_path, tower):
    """A predictor in use stays where a file brings none, gives way to one that it brings, and is never half."""
    torch.save(tower.state_dict(), tmp_path / "plain.pt")
    tower.set_pruning(keep_rate=0.5, predictor_init="random")
    torch.save(tower.state_dict(), tmp_path / "pruned.pt")
    other = timm.create_model("patchrank_clip_digits", keep_rate=0.5, predictor_init="random")
    weight = other.pruner.reducer.predictor.head.weight
    before = weight.clone()
    load_tower(other, tmp_path / "plain.pt")
    assert torch.equal(weight, before)
    load_tower(other, tmp_path / "pruned.pt")
    assert torch.equal(weight, tower.pruner.reducer.predictor.head.weight)
    load_tower(timm.create_model("patchrank_clip_digits"), tmp_path / "pruned.pt")
    torch.save(edited(tower.state_dict(), **{"pruner.reducer.predictor.head.bias": None}), tmp_path / "half.pt")
    with pytest.raises(UserError, match="pruner.reducer.predictor.head.bias is missing"):
        load_tower(other, tmp_path / "half.pt")


def test_weights_that_a_predictor_was_not_fitted_to_are_taken_back(tmp_path, tower):
    torch.save(tower.state_dict(), tmp_path / "random.pt")
    fitted = timm.create_model("patchrank_clip_digits", pretrained=True, keep_rate=0.5)
    before = {key: value.clone() for key, value in fitted.state_dict().items()}
    with pytest.raises(UserError, match="was fitted to patchrank_clip_digits"):
        load_tower(fitted, tmp_path / "random.pt")
    assert all(torch.equal(value, before[key]) for key, value in fitted.state_dict().items())


def test_what_no_layout_knows(tmp_path):
    with pytest.raises(UserError, match="no image tower of a layout that is known.*'visual.layer1.0.conv1.weight'"):
        to_pair({"visual.layer1.0.conv1.weight": torch.ones(1)})
    for content, message in [
        (torch.ones(2), "holds a Tensor, not weights by name"),
        ({"epoch": 1}, "holds no weights by name"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is sparse"),
        ({"a": torch.ones(2, device="meta")}, "a is .*without content"),
    ]:
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(UserError, match=f"w.pt: {message}"):
            read_checkpoint(tmp_path / "w.pt")


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("act_layer", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_published_architectures_at_full_size(name, act_layer, capsys):
    """Random weights of open_clip's own models, image embeddings within 1e-4, text within 1e-5."""
    from open_clip.transformer import QuickGELU

    from patchrank.models.text import create_text_tower

    torch.manual_seed(0)
    theirs = open_clip.create_model(name, force_quick_gelu=act_layer == "quick_gelu").eval()
    state, grid = theirs.state_dict(), theirs.visual.grid_size[0]
    width, layers = theirs.visual.conv1.out_channels, len(theirs.visual.transformer.resblocks)
    shape = dict(patch_size=224 // grid, embed_dim=width, depth=layers, num_heads=width // 64, pre_norm=True)
    shape |= dict(num_classes=state["visual.proj"].shape[1], norm_layer=partial(LayerNorm, eps=1e-5))
    tower = PrunedVisionTransformer(act_layer=act_layer, **shape).eval()
    tower.load_state_dict(checkpoint_filter_fn(state, tower))
    image, tokens = torch.randn(1, 3, 224, 224), open_clip.tokenize(["a photo of a cat.", "seven"])
    found = (tower(image) - theirs.encode_image(image)).abs().max().item()
    text_width = state["token_embedding.weight"].shape[1]
    text = create_text_tower(
        act_layer == "quick_gelu", width=text_width, heads=text_width // 64, layers=12, output_dim=shape["num_classes"]
    ).eval()
    text.load_state_dict(to_pair(state).text)
    assert type(text.transformer.resblocks[0].mlp.gelu) is (QuickGELU if act_layer == "quick_gelu" else nn.GELU)
    said = (text(tokens) - theirs.encode_text(tokens)).abs().max().item()
    with capsys.disabled():
        print(f"\n{name} {act_layer}: image {found:.1e}, text {said:.1e}")
    assert found < 1e-4 and said < 1e-5
