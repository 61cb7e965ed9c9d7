"""A model that somebody made with open_clip, before, during and after pruning."""

import copy

import open_clip
import pytest
import timm
import torch
from helpers.tiny_open_clip import create, images_of, tokens
from open_clip.model import convert_weights_to_lp, set_model_preprocess_cfg
from timm.models.vision_transformer import VisionTransformer

import patchrank
from patchrank.layers.predictors import create_predictor, save_predictor
from patchrank.models.checkpoints.filter import checkpoint_filter_fn
from patchrank.models.open_clip.visual import OpenClipTrunk
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.utils.errors import UserError


def prune(model, **pruning):
    return patchrank.prune_open_clip(model, **{"keep_rate": 0.5, "reducer": "random"} | pruning)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"quick_gelu": True},
        {"ls_init_value": 0.5},
        {"no_ln_pre": True},
        {"output_tokens": True},
        {"pos_embed_type": "sin_cos_2d"},
        {"block_type": "custom"},
        {"final_ln_after_pool": True},
        {"mlp_ratio": 2.7, "image_size": (32, 48), "head_width": 16},
        {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
    ],
)
def test_a_native_tower_of_any_shape_answers_as_before_and_comes_back_bit_for_bit(vision):
    model, plain = create(**vision), create(**vision)
    images, before, native = images_of(model), weights(model), model.visual
    assert patchrank.prune_open_clip(model) is model
    assert isinstance(model.visual.trunk, PrunedVisionTransformer)
    for ours, theirs in zip(model.visual(images), plain.visual(images)):  # a pair with output_tokens
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert same(model.state_dict(), before) and not any(module.training for module in model.modules())
    assert patchrank.unprune(model).visual is native
    assert same(model.state_dict(), before)
    assert torch.equal(model.encode_text(tokens()), plain.encode_text(tokens()))


@torch.no_grad()
@pytest.mark.parametrize("proj", [None, "linear", "none"])
def test_a_timm_tower_answers_bit_for_bit_and_its_trunk_is_left_alone(proj):
    model = create("timm", timm_proj=proj)
    images, visual, trunk = images_of(model), model.visual, model.visual.trunk
    before, attributes = model.visual(images), {key: copy.copy(value) for key, value in vars(trunk).items()}
    patchrank.prune_open_clip(model)
    assert torch.equal(model.visual(images), before)
    assert model.visual.trunk.head is trunk.head and model.visual.trunk.pos_embed is trunk.pos_embed
    model.visual.trunk.set_pruning(keep_rate=0.5, reducer="random")
    assert not torch.equal(model.visual(images), before)
    assert vars(trunk) == attributes and type(trunk) is VisionTransformer
    patchrank.unprune(model)
    assert model.visual is visual and visual.trunk is trunk
    assert torch.equal(model.visual(images), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["native", "timm"])
def test_pruning_reaches_all_ways_through_the_model(kind):
    model = create(kind)
    images = images_of(model)
    whole = model.encode_image(images)
    prune(model)
    out = model.visual.trunk.forward_pruned(images)
    assert out.kept.shape[1] == round(model.visual.trunk.num_patches * 0.5)
    assert torch.equal(model.encode_image(images), out.embedding)
    assert not torch.allclose(out.embedding, whole, atol=1e-3)
    z = torch.nn.functional.normalize(out.embedding, dim=-1)
    assert torch.equal(model.encode_image(images, normalize=True), z)
    assert torch.equal(model(images, tokens())[0], z)
    found = model.forward_intermediates(images, tokens(), image_indices=2, image_output_extra_tokens=True)
    assert [m.shape[-2:] for m in found["image_intermediates"]] == [model.visual.trunk.patch_embed.grid_size] * 2
    torch.testing.assert_close(found["image_features"], z, atol=1e-5, rtol=1e-5)
    prune(model, keep_rate=1.0)  # a second time changes the settings
    torch.testing.assert_close(model.encode_image(images), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_intermediates_of_a_native_tower_are_open_clips():
    model, plain = create(), create()
    patchrank.prune_open_clip(model)
    how = {"indices": [1, 11], "output_extra_tokens": True, "normalize_intermediates": True}
    ours = model.visual.forward_intermediates(images_of(model), **how)
    theirs = plain.visual.forward_intermediates(images_of(model), **how)
    assert set(ours) == set(theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert set(model.visual.forward_intermediates(images_of(model), intermediates_only=True)) == {"image_intermediates"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["native", "timm"])
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_go_both_ways_and_leave_the_predictor_out(kind, assign):
    model, other = create(kind), create(kind, seed=1)
    predictor = create_predictor("mix_mlp", *{"native": (64, (8, 8)), "timm": (192, (14, 14))}[kind])
    prune(model, reducer="predictor", predictor=predictor)
    kept = predictor.state_dict()
    fresh = create(kind, seed=2)
    fresh.load_state_dict(model.state_dict(), assign=assign)
    assert same(fresh.state_dict(), create(kind).state_dict())
    model.load_state_dict(other.state_dict(), assign=assign)
    assert same(model.state_dict(), other.state_dict())
    assert model.visual.trunk.pruner.reducer.predictor is predictor and same(predictor.state_dict(), kept)
    patchrank.unprune(model)
    assert torch.equal(model.encode_image(images_of(model)), other.encode_image(images_of(model)))


def test_checkpoints_that_do_not_fit_are_told_by_their_own_names():
    model = prune(create())
    state = model.state_dict()
    state["visual.nosuch"] = state.pop("visual.class_embedding")
    with pytest.raises(RuntimeError, match='Missing key.*"visual.class_embedding"') as caught:
        model.load_state_dict(state)
    assert 'Unexpected key(s) in state_dict: "visual.nosuch"' in str(caught.value)
    assert "trunk" not in str(caught.value)


@pytest.mark.parametrize("kind", ["native", "timm"])
def test_a_state_dict_shows_the_weights_in_use(kind):
    model = prune(create(kind))
    for name, value in model.state_dict().items():
        value.zero_()
        assert not model.state_dict()[name].any()
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["native", "timm"])
def test_training_meanwhile_is_kept_and_modes_and_flags_too(kind):
    model = create(kind).train()
    frozen = "visual.conv1.weight" if kind == "native" else "visual.trunk.patch_embed.proj.weight"
    model.get_parameter(frozen).requires_grad_(False)
    number = sum(p.numel() for p in model.parameters())
    prune(model)
    assert model.visual.training and model.visual.trunk.training
    assert sum(p.numel() for p in model.parameters()) == number
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "visual.trunk.patch_embed.proj.weight"
    }
    before, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        image, text, scale = model(images_of(model), tokens()[:2])
        (scale * image @ text.T).diag().sum().backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
    optimizer.step()
    after = weights(model)
    assert {name for name in after if torch.equal(before[name], after[name])} == {frozen}
    model.eval()
    patchrank.unprune(model)
    assert same(model.state_dict(), after)
    assert not model.visual.training
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {frozen}
    native = model.visual.transformer if kind == "native" else model.visual.trunk
    assert native.grad_checkpointing


@pytest.mark.parametrize("kind", ["native", "timm"])
@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers")
def test_locking_freezes_what_open_clip_would(kind):
    for groups in (0, 1, 2, 14):
        model, plain = prune(create(kind)), create(kind)
        model.lock_image_tower(unlocked_groups=groups)
        plain.lock_image_tower(unlocked_groups=groups)
        patchrank.unprune(model)
        flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (model, plain)]
        assert flags[0] == flags[1]


def test_weight_decay_spares_the_parameters_that_exist():
    model = prune(create())
    assert {"visual.trunk.cls_token", "visual.trunk.pos_embed", "positional_embedding"} == model.no_weight_decay()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["native", "timm"])
def test_copies_are_independent_and_half_precision_goes_through(kind):
    model = prune(create(kind), predictor_init="random", reducer="predictor")
    images = images_of(model)
    expected = model.encode_image(images)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(model.encode_image(images), expected)
    other = patchrank.unprune(copy.deepcopy(model))
    assert same(other.state_dict(), model.state_dict())
    other.load_state_dict({name: torch.zeros_like(value) for name, value in other.state_dict().items()})
    assert torch.equal(model.encode_image(images), expected)
    model.to(torch.bfloat16)
    assert model.encode_image(images.bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in patchrank.unprune(model).parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_open_clips_own_mixed_precision():
    model = create(cast_dtype=torch.bfloat16)
    convert_weights_to_lp(model, torch.bfloat16)
    images, before, types = images_of(model).bfloat16(), weights(model), {p.dtype for p in model.visual.parameters()}
    assert types == {torch.float32, torch.bfloat16}
    expected = model.encode_image(images)
    prune(model, keep_rate=1.0)
    torch.testing.assert_close(model.encode_image(images), expected, atol=0.05, rtol=0)
    prune(model, reducer="predictor", predictor_init="random")
    assert model.encode_image(images).dtype == torch.bfloat16
    assert same(patchrank.unprune(model).state_dict(), before)


def test_what_open_clip_keeps_at_the_tower_is_still_there():
    model = create()
    set_model_preprocess_cfg(model, {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize_mode": "squash"})
    before = {name: getattr(model.visual, name) for name in ("image_size", "grid_size", "preprocess_cfg", "image_mean")}
    prune(model)
    assert {name: getattr(model.visual, name) for name in before} == before
    assert open_clip.get_model_preprocess_cfg(model)["resize_mode"] == "squash"
    assert model.visual.trunk.pretrained_cfg["crop_mode"] == "squash"
    model.visual.preprocess_cfg = {"size": 32}
    assert patchrank.unprune(model).visual.preprocess_cfg == {"size": 32}


def test_a_predictor_file_serves_open_clips_tower_and_timms(tmp_path):
    """The same weights have the same fingerprint, whoever holds them."""
    model = create(quick_gelu=True)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 32}
    tower = timm.create_model("patchrank_clip_b16", **shape)
    tower.load_state_dict(checkpoint_filter_fn(model.state_dict(), tower))
    about = {"name": "mix_mlp", "kwargs": {}, "grid": [8, 8], "embed_dim": 64, "location": 4, "metric": "preservation"}
    about |= {"model": {"name": "b16", "sha256": tower.blocks_sha256()}}
    path = tmp_path / "predictor.safetensors"
    save_predictor(create_predictor("mix_mlp", 64, (8, 8)), path, about)
    prune(model, reducer="predictor", predictor_path=path)
    with pytest.raises(UserError, match="fitted to b16 with weights"):
        prune(create(seed=1), reducer="predictor", predictor_path=path)


@pytest.mark.parametrize(
    "vision, feature",
    [
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "attentional pooling"),
        ({"pool_type": "avg"}, "pool_type 'avg'"),
        ({"patch_dropout": 0.5}, "patch_dropout"),
        ({"qk_norm": True}, "qk_norm"),
        ({"scaled_cosine_attn": True}, "scaled_cosine_attn"),
        ({"scale_heads": True}, "scale_heads"),
        ({"scale_attn_inner": True}, "scale_attn_inner"),
        ({"scale_attn": True}, "scale_attn"),
        ({"scale_fc": True}, "scale_fc"),
        ({"output_tokens": True, "final_ln_after_pool": True}, "output_tokens with final_ln_after_pool"),
        ({"layers": (1, 1, 1, 1), "patch_size": None}, "ModifiedResNet"),
        ({"kind": "timm", "timm_pool": ""}, "timm_pool ''"),
        ({"kind": "timm", "timm_model_name": "test_vit2", "timm_pool": "map", "timm_proj": "none"}, "dynamic_img_size"),
        ({"kind": "timm", "timm_model_name": "test_convnext", "timm_pool": "avg"}, "timm's ConvNeXt"),
        ({"kind": "timm", "timm_model_name": "test_resnet", "timm_pool": "avg"}, "timm's ResNet"),
        ({"kind": "timm", "patch_dropout": 0.5}, "patch_dropout"),
        ({"kind": "timm", "timm_model_name": "test_vit", "image_size": 160}, "dynamic_img_size"),
    ],
)
def test_towers_that_ours_cannot_reproduce_are_refused_by_name(vision, feature):
    model = create(**vision)
    visual, trunk = model.visual, getattr(model.visual, "trunk", None)
    with pytest.raises(UserError, match=f"cannot take this image tower: {feature}"):
        patchrank.prune_open_clip(model)
    assert model.visual is visual and getattr(visual, "trunk", None) is trunk


@pytest.mark.parametrize(
    "timm_pool, more", [("avg", {}), pytest.param("map", {"timm_proj": "none"}, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_timms_towers_may_pool_by_average_or_attention(timm_pool, more):
    if timm_pool == "map":  # as ViT-B-16-SigLIP of open_clip
        more = more | {"timm_model_name": "vit_base_patch16_siglip_224"}
    model = create("timm", timm_pool=timm_pool, **more)
    images = images_of(model)
    before, keys = model.encode_image(images), list(model.state_dict())
    patchrank.prune(model, keep_rate=0.5, reducer="tome", locations=(4, 5))
    pruned = model.encode_image(images)
    assert pruned.shape == before.shape and not torch.allclose(pruned, before, atol=1e-4)
    torch.testing.assert_close(patchrank.find_tower(model)(images), model.visual.trunk(images))
    assert list(model.state_dict()) == keys
    assert torch.equal(patchrank.unprune(model).encode_image(images), before)


def test_patched_layers_are_refused():
    model = create()
    model.visual.transformer.resblocks[1].mlp.gelu = torch.nn.SiLU()
    with pytest.raises(UserError, match="activation SiLU"):
        patchrank.prune_open_clip(model)
    model = create()
    model.visual.transformer.resblocks[1].mlp.c_fc = torch.nn.Linear(64, 256, bias=False)
    with pytest.raises(UserError, match=r"weight 'blocks.1.mlp.fc1.bias' .* is \[\], but .* has \[256\]"):
        patchrank.prune_open_clip(model)
    model = create()
    model.visual.transformer.resblocks[0].register_forward_hook(lambda *args: None)
    with pytest.raises(UserError, match="hooks on transformer.resblocks.0 would be lost"):
        patchrank.prune_open_clip(model)
    model = create("timm")
    model.visual.trunk.forward = model.visual.trunk.forward_features
    with pytest.raises(UserError, match="compiled or patched forward"):
        patchrank.prune_open_clip(model)
    model = create("timm")
    model.visual.trunk.patch_embed = torch.nn.Identity()
    with pytest.raises(UserError, match="patch embedding Identity"):
        patchrank.prune_open_clip(model)
    with pytest.raises(UserError, match="none at all"):
        patchrank.prune_open_clip(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("kind", ["native", "timm"])
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep_rat": 0.5}, "did you mean 'keep_rate'"),
        ({"keep_rate": 0.5, "reducer": "predictor"}, "no weights to rank by"),
        ({"locations": (99,)}, "from 1 to the tower's depth"),
    ],
)
def test_impossible_settings_change_nothing(kind, settings, message):
    model = create(kind)
    before, visual, trunk = weights(model), model.visual, getattr(model.visual, "trunk", None)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        patchrank.prune_open_clip(model, **settings)
    assert model.visual is visual and getattr(visual, "trunk", None) is trunk
    assert same(model.state_dict(), before) and [p.requires_grad for p in model.parameters()] == flags


def test_unprune_needs_something_to_undo():
    with pytest.raises(UserError, match="needs a model from prune_open_clip, but this CLIP is not"):
        patchrank.unprune(create())
    model = prune(create())
    model.visual.trunk.blocks[0].mlp.fc1 = torch.nn.Sequential(model.visual.trunk.blocks[0].mlp.fc1)
    with pytest.raises(UserError, match="finds a layer of the image tower replaced"):
        patchrank.unprune(model)
    assert isinstance(model.visual.trunk, OpenClipTrunk)


def test_an_adopted_tower_is_saved_by_open_clip_and_not_by_us(tmp_path):
    model = prune(create())
    with pytest.raises(UserError, match="takes a tower that timm.create_model made .* but got a NativeTrunk"):
        patchrank.save_pretrained(model.visual.trunk, tmp_path / "tower")
    assert not list(tmp_path.iterdir())
