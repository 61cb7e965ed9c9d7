"""What people do with a model that was pruned in place: features, masks, hooks, LoRA, wrappers, other sizes."""

import copy

import pytest
import timm
import torch
from helpers import toy_hosts
from torch import nn

import patchrank
from patchrank.layers.module_hooks import is_hooked
from patchrank.utils.errors import UserError

DROPPING = dict(locations=(3,), keep_rate=0.5, reducer="center")
MERGING = dict(locations=(2, 3), keep_rate=0.5, reducer="tome")
WITH_CLASS_TOKEN, WITHOUT = "Dinov2Model", "SiglipVisionModel"


@pytest.fixture
def x():
    return toy_hosts.images()


def of_transformers(name, **changes):
    pytest.importorskip("transformers")
    return toy_hosts.create(name, **changes)


@pytest.mark.parametrize("name", ["timm vit", "timm dinov2"])
@pytest.mark.parametrize("settings", [DROPPING, MERGING], ids=["drop", "merge"])
@torch.no_grad()
def test_features_between_layers_are_on_the_full_grid(name, settings, x):
    model = patchrank.prune(toy_hosts.create(name), **settings)
    tower = patchrank.find_tower(model)
    for norm in (False, True):
        found = model.forward_intermediates(x, indices=[0, 2, 3], norm=norm, intermediates_only=True)
        expected = tower.forward_intermediates(x, indices=[0, 2, 3], norm=norm, intermediates_only=True)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, tower.forward_intermediates(x, indices=[1], intermediates_only=True))
    torch.testing.assert_close(model.forward_features(x), tower.forward_features(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_that_averages_has_the_mean_where_patches_left(x):
    model = patchrank.prune(toy_hosts.create("timm average"), **DROPPING)
    kept = patchrank.find_tower(model).forward_pruned(x).kept
    patches = model.forward_features(x)[:, 1:]
    mean = torch.stack([image[places].mean(0) for image, places in zip(patches, kept)])
    left = torch.ones(3, toy_hosts.NUM_PATCHES).scatter(1, kept, 0.0).bool()
    torch.testing.assert_close(patches[left], mean.repeat_interleave(8, 0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [WITH_CLASS_TOKEN, WITHOUT])
@torch.no_grad()
def test_kept_tokens_alone(name, x):
    model = patchrank.prune(of_transformers(name), **DROPPING)
    grid, first = model(x), patchrank.find_tower(model).num_prefix_tokens
    kept = patchrank.find_tower(model).forward_pruned(x).kept
    found = patchrank.prune(model, output="kept")(x)
    torch.testing.assert_close(found.pooler_output, grid.pooler_output, atol=1e-6, rtol=1e-5)
    patches = grid.last_hidden_state[:, first:]
    expected = patches.gather(1, kept[..., None].expand(-1, -1, toy_hosts.DIM))
    torch.testing.assert_close(found.last_hidden_state[:, first:], expected, atol=1e-6, rtol=1e-5)
    assert int((patches != 0).any(-1).sum()) == kept.numel()
    if name == WITHOUT:
        with pytest.raises(UserError, match="output 'kept' does not tell how many patches"):
            patchrank.prune(model, **MERGING)
        assert torch.equal(model(x).last_hidden_state, found.last_hidden_state)


@torch.no_grad()
def test_what_is_replaced_later_runs(x):
    """LoRA puts a layer of its own into the place of a projection, when the model may be pruned already."""

    class Doubled(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return 2 * self.layer(x)

    def change(model):
        attention = model.encoder.layer[2].attention
        new = hasattr(attention, "q_proj")  # 4.57 has an attention inside, and an output behind it
        for owner, name in (
            ((attention, "q_proj"), (attention, "o_proj"))
            if new
            else ((attention.attention, "query"), (attention.output, "dense"))
        ):
            setattr(owner, name, Doubled(getattr(owner, name)))
        return model

    before = patchrank.prune(change(of_transformers(WITH_CLASS_TOKEN)), **DROPPING)
    after = change(patchrank.prune(of_transformers(WITH_CLASS_TOKEN), **DROPPING))
    assert torch.equal(after(x).pooler_output, before(x).pooler_output)
    plain = patchrank.prune(of_transformers(WITH_CLASS_TOKEN), **DROPPING)
    assert not torch.allclose(after(x).pooler_output, plain(x).pooler_output, atol=1e-3)


@torch.no_grad()
def test_hooks_run_or_are_refused(x):
    seen = []
    model = patchrank.prune(of_transformers(WITHOUT), **DROPPING)
    layer = toy_hosts.core_of(model).encoder.layers[1]
    for part in (layer.mlp, layer.self_attn.q_proj, layer.layer_norm1):
        part.register_forward_hook(lambda module, args, output: seen.append(module))
    model(x)
    assert {*seen} == {layer.mlp, layer.self_attn.q_proj, layer.layer_norm1}
    layer.self_attn.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="hooks .* on SiglipAttention would not run in a pruned model"):
        model(x)


@torch.no_grad()
def test_a_forward_of_its_own_is_refused_and_the_classs_own_is_not(x):
    model = patchrank.prune(of_transformers(WITHOUT), **DROPPING)
    first, second, *_ = toy_hosts.core_of(model).encoder.layers
    expected = model(x).pooler_output
    for strange in (lambda *args, **kwargs: args[0], first.forward):  # the other is bound to another layer
        second.forward = strange
        with pytest.raises(UserError, match="a forward of its own on SiglipEncoderLayer would not run"):
            model(x)
        del second.forward
    second.forward = second.forward  # as transformers 4.57 leaves it
    assert torch.equal(model(x).pooler_output, expected)


@pytest.mark.parametrize("part", ["", "attention", "attention.attention", "attention.output", "output"])
@torch.no_grad()
def test_hooks_on_what_runs_part_by_part_are_refused(part, x):
    model = patchrank.prune(of_transformers("ViTModel"), **DROPPING)
    layer = patchrank.find_tower(model).host_layers()[1]
    names = [name for name, _ in layer.named_modules()]
    if part not in names:
        pytest.skip("transformers 4.57 has this part, and later releases do not")
    hook = layer.get_submodule(part).register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=r"hooks .* on ViT\w+ would not run in a pruned model"):
        model(x)
    hook.remove()
    model(x)


@torch.no_grad()
def test_every_dropout_of_a_layer_runs(x):
    model = patchrank.prune(of_transformers("ViTModel"), **DROPPING)
    expected = model.layernorm(model.embeddings(x))[:, 0]
    tower = patchrank.find_tower(model)
    for layer in tower.host_layers():
        for part in layer.modules():
            if isinstance(part, nn.Dropout):
                part.p = 1.0
    assert not torch.allclose(tower(x), expected, atol=1e-3)
    model.train()
    torch.testing.assert_close(tower(x), expected)  # nothing is added to a token on its way


@torch.no_grad()
def test_mlps_in_two_halves_are_looked_up_at_each_call(x):
    model = patchrank.prune(of_transformers("ViTModel"), **DROPPING)
    layer = patchrank.find_tower(model).host_layers()[2]
    if hasattr(layer, "mlp"):
        pytest.skip("transformers 4.57 has two halves, later releases one module")
    before, output = model(x).pooler_output, layer.output
    layer.output = copy.deepcopy(output)
    layer.output.dense.weight.mul_(2)
    assert not torch.allclose(model(x).pooler_output, before, atol=1e-3)
    layer.output = output
    assert torch.equal(model(x).pooler_output, before)


@torch.no_grad()
def test_features_that_pruned_layers_do_not_have_are_refused(x):
    model = of_transformers(WITHOUT)
    whole = model(x, output_hidden_states=True)  # which leaves hooks of transformers' own behind
    assert len(whole.hidden_states) == toy_hosts.DEPTH + 1
    patchrank.prune(model, **DROPPING)
    model(x)
    for asked in ("output_hidden_states", "output_attentions"):
        with pytest.raises(UserError, match=f"{asked} does not go together with pruning"):
            model(x, **{asked: True})
    patchrank.unprune(model)
    assert torch.equal(model(x, output_hidden_states=True).hidden_states[2], whole.hidden_states[2])


def test_checkpointing_of_transformers_changes_no_gradient(x):
    def gradients(model):
        model.train()(x).pooler_output.square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    plain = gradients(patchrank.prune(of_transformers(WITHOUT), **MERGING))
    model = patchrank.prune(of_transformers(WITHOUT), **MERGING)
    model.gradient_checkpointing_enable()
    found = gradients(model)
    assert patchrank.find_tower(model).grad_checkpointing
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient)


def test_checkpointing_of_timm_is_refused_and_ours_is_not(x):
    model = patchrank.prune(toy_hosts.create("timm vit"), **DROPPING)
    model(x).sum().backward()
    expected = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing(True)
    with pytest.raises(UserError, match="gradient checkpointing .*find_tower"):
        model(x)
    model.set_grad_checkpointing(False)
    patchrank.find_tower(model).set_grad_checkpointing(True)
    model(x).sum().backward()
    torch.testing.assert_close(model.patch_embed.proj.weight.grad, expected)


@torch.no_grad()
def test_images_of_another_size(x):
    model = patchrank.prune(of_transformers(WITH_CLASS_TOKEN), **DROPPING)
    larger = torch.randn(2, 3, 48, 48)
    with pytest.raises(UserError, match="pruned for images of 32 x 32 pixels, 17 tokens, but got 37"):
        model(larger)
    with pytest.raises(UserError, match="img_size 48: the model is pruned for 32 pixels; try patchrank.unprune"):
        patchrank.prune(model, img_size=48)
    patchrank.prune(patchrank.unprune(model), img_size=48, **DROPPING)
    assert model(larger).last_hidden_state.shape == (2, 37, toy_hosts.DIM)
    torch.testing.assert_close(patchrank.find_tower(model)(larger), model(larger).pooler_output)


@torch.no_grad()
def test_heads_that_are_replaced_later(x):
    model = patchrank.prune(toy_hosts.create("timm vit"), **DROPPING)
    model.reset_classifier(3)
    tower = patchrank.find_tower(model)
    assert tower.num_classes == 3
    torch.testing.assert_close(tower(x), model(x))


def features(pair, x):
    """A pair's image embeddings, which 4.57 gives as they are."""
    out = pair.get_image_features(x)
    return out if isinstance(out, torch.Tensor) else out.pooler_output


@torch.no_grad()
def test_the_pair_of_transformers_is_taken_by_its_image_tower(x):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    config = transformers.SiglipConfig(text_config=text, vision_config=toy_hosts.HF | dict(intermediate_size=64))
    pair = transformers.SiglipModel(config).eval()
    keys, before = list(pair.state_dict()), features(pair, x)
    patchrank.prune(pair, **DROPPING)
    assert not torch.allclose(features(pair, x), before, atol=1e-4)
    assert list(pair.state_dict()) == keys
    assert torch.equal(features(patchrank.unprune(pair), x), before)


@torch.no_grad()
def test_a_classifier_of_transformers_that_reads_the_class_token(x):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**toy_hosts.HF, intermediate_size=64, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    before = model(x).logits
    patchrank.prune(model, **DROPPING)
    expected = model.classifier(patchrank.find_tower(model)(x))
    torch.testing.assert_close(model(x).logits, expected)
    assert not torch.allclose(expected, before, atol=1e-4)


@torch.no_grad()
def test_a_pruned_model_is_saved_as_its_library_does_it(tmp_path, x):
    model = of_transformers(WITHOUT)
    before = model(x).pooler_output
    patchrank.prune(model, **DROPPING).save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(x).pooler_output, before)


@pytest.mark.parametrize("name", [WITH_CLASS_TOKEN, WITHOUT, "ViTModel", "CLIPVisionModel"])
@torch.no_grad()
def test_dropout_of_attention_follows_the_mode(name, x):
    key = "attention_dropout" if name in (WITHOUT, "CLIPVisionModel") else "attention_probs_dropout_prob"
    for before in (True, False):  # the mode while it is pruned changes nothing
        model = patchrank.prune(of_transformers(name, **{key: 0.5}).train(before), **DROPPING)
        model.eval()
        assert torch.equal(model(x).pooler_output, model(x).pooler_output)
        model.train()
        assert not torch.equal(model(x).pooler_output, model(x).pooler_output)


def test_parts_that_are_frozen_keep_their_mode(x):
    model = of_transformers(WITHOUT).train()
    toy_hosts.core_of(model).encoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert [module.training for module in patchrank.unprune(patchrank.prune(model, **DROPPING)).modules()] == modes


def test_usual_locations_are_those_of_every_tower():
    for name in ("timm siglip", WITHOUT):
        more = dict(depth=12) if name == "timm siglip" else dict(num_hidden_layers=12)
        model = toy_hosts.create(name, **more) if name == "timm siglip" else of_transformers(name, **more)
        patchrank.prune(model, keep_rate=0.5, reducer="center")
        assert list(patchrank.find_tower(model).pruner.drops) == [4, 6, 8, 10]


@torch.no_grad()
def test_pooling_may_change_while_a_model_is_pruned(x):
    model = patchrank.prune(toy_hosts.create("timm vit"), **DROPPING)
    model.reset_classifier(5, "avg")
    torch.testing.assert_close(patchrank.find_tower(model)(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_that_are_replaced_run(x):
    def change(model):
        model.blocks[3] = nn.Identity()
        for block in model.blocks:
            if hasattr(block, "mlp"):
                block.mlp = nn.Identity()
        return model

    pruned = change(patchrank.prune(toy_hosts.create("timm vit"), **DROPPING))
    plain = patchrank.prune(toy_hosts.create("timm vit"), **DROPPING)
    assert not torch.allclose(pruned(x), plain(x), atol=1e-3)
    torch.testing.assert_close(patchrank.find_tower(pruned)(x), pruned(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_changes_that_pruning_cannot_follow_are_refused(x):
    resized = patchrank.prune(toy_hosts.create("timm vit"), **DROPPING)
    resized.set_input_size(img_size=64)
    other_norm = patchrank.prune(toy_hosts.create("timm average without class token"), **DROPPING)
    other_norm.norm = nn.LayerNorm(toy_hosts.DIM)
    fewer = patchrank.prune(of_transformers(WITHOUT), **DROPPING)
    encoder = toy_hosts.core_of(fewer).encoder
    encoder.layers = encoder.layers[:3]
    for model, changed in ((resized, "image size"), (other_norm, "norm"), (fewer, "list of layers")):
        side = model.patch_embed.img_size[0] if model is resized else 32
        with pytest.raises(UserError, match=f"the model's {changed} was changed; try patchrank.unprune"):
            model(torch.randn(1, 3, side, side))


@pytest.mark.parametrize("name", ["timm vit", "timm siglip", WITHOUT, WITH_CLASS_TOKEN])
@torch.no_grad()
def test_weights_that_are_assigned_reach_the_tower_inside(name, x):
    model = patchrank.prune(toy_hosts.create(name) if "timm" in name else of_transformers(name), **DROPPING)
    model.load_state_dict({key: 1.1 * value for key, value in model.state_dict().items()}, assign=True)
    found = toy_hosts.embedding(model, x)
    torch.testing.assert_close(patchrank.find_tower(model)(x), found, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_kept_tokens_are_no_maps(x):
    model = patchrank.prune(toy_hosts.create("timm vit"), output="kept", **DROPPING)
    with pytest.raises(UserError, match="output 'kept' gives no features between layers"):
        model.forward_intermediates(x, indices=[3])


@torch.no_grad()
def test_positions_may_be_interpolated(x):
    model = patchrank.prune(of_transformers(WITHOUT), img_size=48, **DROPPING)
    larger = torch.randn(2, 3, 48, 48)
    found = model(larger, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(patchrank.find_tower(model)(larger), found, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="img_size must be a side of at least 8 pixels"):
        patchrank.prune(of_transformers(WITHOUT), img_size="a")


@torch.no_grad()
def test_a_gated_mlp_is_counted(x):
    model = of_transformers(WITH_CLASS_TOKEN, use_swiglu_ffn=True)
    tower = patchrank.find_tower(patchrank.prune(model, **DROPPING))
    linear = [part for part in model.encoder.layer[0].mlp.modules() if isinstance(part, nn.Linear)]
    gated = sum(part.in_features * part.out_features for part in linear)
    plain = patchrank.find_tower(patchrank.prune(of_transformers(WITH_CLASS_TOKEN), **DROPPING))
    per_token = (tower.macs_unpruned().image - plain.macs_unpruned().image) / (17 * toy_hosts.DEPTH)
    assert per_token == pytest.approx(gated - 2 * toy_hosts.DIM * 64, abs=2 * toy_hosts.DIM)


@torch.no_grad()
def test_what_a_config_asks_for_is_refused_too(x):
    model = of_transformers("ViTModel", output_hidden_states=True)
    assert len(model(x).hidden_states) == toy_hosts.DEPTH + 1
    patchrank.prune(model, **DROPPING)
    with pytest.raises(UserError, match="output_hidden_states does not go together with pruning"):
        model(x)


@torch.no_grad()
def test_a_host_that_averages_all_tokens(x):
    model = patchrank.prune(toy_hosts.create("timm average", pool_include_prefix=True), **DROPPING)
    torch.testing.assert_close(model(x), patchrank.find_tower(model)(x), atol=1e-5, rtol=1e-5)


def test_hooks_on_all_blocks_are_refused():
    model = toy_hosts.create("timm vit")
    model.blocks.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="hooks on blocks as a whole would not run"):
        patchrank.prune(model, **DROPPING)


def test_hooks_on_a_whole_encoder_are_refused(x):
    model = of_transformers(WITHOUT)
    toy_hosts.core_of(model).encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=r"hooks on the encoder of SiglipVision\w+ would not run"):
        patchrank.prune(model, **DROPPING)


def unknown():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    yield transformers.BertModel(transformers.BertConfig(**small, vocab_size=9)), "does not know BertModel"
    naflex = transformers.Siglip2VisionConfig(**small, num_patches=16, patch_size=8)
    yield transformers.Siglip2VisionModel(naflex), "does not know Siglip2VisionModel"
    yield transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**small)), "does not know DINOv3ViTModel"
    no_head = transformers.SiglipVisionConfig(**small, image_size=16, patch_size=8, vision_use_head=False)
    yield transformers.SiglipVisionModel(no_head), "without a pooling head"
    averaging = transformers.Dinov2Config(**toy_hosts.HF | dict(num_hidden_layers=1))
    yield transformers.Dinov2ForImageClassification(averaging), "does not know Dinov2ForImageClassification"
    yield timm.create_model("eva02_tiny_patch14_224", depth=1), "timm's Eva, whose positions"
    yield timm.create_model("resnet18"), "timm's ResNet"
    yield timm.create_model("vit_base_patch16_224", **toy_hosts.TIMM, global_pool="max"), "global_pool is 'max'"
    yield nn.Linear(2, 2), "but got torch.nn.modules.linear.Linear; try the model that it is of"


def test_what_is_not_known_is_refused_by_name():
    for model, told in unknown():
        with pytest.raises(UserError, match=told) as caught:
            patchrank.prune(model, **DROPPING)
        assert "\n" not in str(caught.value)


@torch.no_grad()
def test_impossible_settings_leave_a_model_as_it_was(x):
    model = toy_hosts.create("timm siglip")
    before, modules = model(x), dict(model.named_modules())
    for settings, told in (
        (dict(reducer="cls_attention"), "no class token"),
        (dict(reducer="pixel_variance"), "reads pixels"),
        (dict(locations=(9,)), "locations must be"),
        (dict(output="all"), "output 'all' does not exist"),
        (dict(img_size=64), "img_size belongs to models of transformers"),
    ):
        with pytest.raises(UserError, match=told):
            patchrank.prune(model, **DROPPING | settings)
        assert dict(model.named_modules()) == modules and torch.equal(model(x), before)
    assert not is_hooked(model.norm) and not is_hooked(model.attn_pool)


@torch.no_grad()
def test_towers_of_ours_go_through_the_same_door(tower, images):
    before = tower(images)
    assert patchrank.prune(tower, keep_rate=0.5, reducer="center") is tower is patchrank.find_tower(tower)
    assert not torch.equal(tower(images), before)
    assert torch.equal(patchrank.unprune(tower)(images), before)
    with pytest.raises(UserError, match="is not pruned; try patchrank.prune"):
        patchrank.find_tower(toy_hosts.create("timm vit"))
