"""Models that are not taken are named by their weights, and none that are taken is named."""

import re

import open_clip
import pytest
import timm
import torch
from helpers.tiny_clip import LAYOUTS, TEXT, create_pair, create_theirs, create_tower, hugging_face
from open_clip.coca_model import CoCa, MultimodalCfg
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from patchrank.models.checkpoints.families import find_family
from patchrank.models.checkpoints.load import load_pair, load_tower
from patchrank.utils.errors import UserError

VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=24)


def trunk(model):
    return {f"visual.trunk.{key}": value for key, value in model.state_dict().items()}


def by_hand(*keys):
    return {key: torch.ones(2) for key in keys}


def resnet():
    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=32)
    return open_clip.CLIP(24, vision, open_clip.CLIPTextCfg(**TEXT)).state_dict()


def coca():
    vision = open_clip.CLIPVisionCfg(
        layers=2, width=64, head_width=32, patch_size=8, image_size=32, attentional_pool=True, output_tokens=True
    )
    text = open_clip.CLIPTextCfg(**TEXT, embed_cls=True, output_tokens=True)
    return CoCa(24, MultimodalCfg(**TEXT), text, vision).state_dict()


def lora():
    named = create_theirs().state_dict().items()
    adapted = {f"base_model.model.{key}": value for key, value in named}
    return adapted | by_hand("base_model.model.visual.transformer.resblocks.0.mlp.c_fc.lora_A.default.weight")


def roberta():
    kept = {key: value for key, value in LAYOUTS["ours"](create_theirs().state_dict()).items() if "text." not in key}
    return kept | by_hand("text.transformer.embeddings.word_embeddings.weight", "text.proj.0.weight")


MADE = {
    "SigLIP": lambda: trunk(VisionTransformer(**VIT, class_token=False, global_pool="map")) | by_hand("logit_bias"),
    "SigLIP, or of another": lambda: by_hand(
        "vision_model.embeddings.patch_embedding.weight", "vision_model.head.probe", "logit_bias"
    ),
    "EVA": lambda: trunk(Eva(**VIT, swiglu_mlp=True, qkv_fused=False, scale_mlp=True)),
    "EVA, EVA-CLIP or DINOv3": lambda: trunk(Eva(**VIT)),
    "CoCa": coca,
    "a LoRA or PEFT adapter": lora,
    "a LoRA": lambda: by_hand("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
    "a ResNet": resnet,
    "a model with a convolutional image tower": lambda: trunk(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))),
    "DINOv2": lambda: VisionTransformer(**VIT, init_values=1e-5).state_dict(),
    "BEiT": lambda: Beit(**VIT, use_rel_pos_bias=True).state_dict(),
    "a masked autoencoder": lambda: (
        VisionTransformer(**VIT).state_dict() | by_hand("mask_token", "decoder_embed.weight")
    ),
    "BLIP": lambda: by_hand("visual_encoder.cls_token", "text_encoder.embeddings.word_embeddings.weight"),
    "a vision transformer of Hugging Face that is no CLIP": lambda: by_hand(
        "vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight"
    ),
    "a vision transformer that is built otherwise than CLIP's": lambda: VisionTransformer(**VIT).state_dict(),
    "a text model alone": lambda: open_clip.transformer.TextTransformer(**TEXT).state_dict(),
    "a text model": lambda: by_hand("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.bias"),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_not_taken_is_named(tmp_path, name):
    torch.save(MADE[name](), tmp_path / "w.pt")
    with pytest.raises(
        UserError, match=f"w.pt: these are weights of {re.escape(name)}.*, which patchrank does not take; try"
    ) as caught:
        load_pair(create_pair(), tmp_path / "w.pt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_towers_alone_and_timms_builder_name_them_too(tmp_path):
    torch.save(resnet(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="w.pt: these are weights of a ResNet, or of a CLIP with one"):
        load_tower(create_tower(), tmp_path / "w.pt")
    for overlay in ({"state_dict": resnet()}, {"file": str(tmp_path / "w.pt")}):
        with pytest.raises(UserError, match="these are weights of a ResNet, or of a CLIP with one"):
            timm.create_model("patchrank_clip_digits", pretrained=True, pretrained_cfg_overlay=overlay)


def test_text_towers_from_elsewhere_matter_to_pairs_alone(tmp_path):
    torch.save(roberta(), tmp_path / "w.pt")
    load_tower(create_tower(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="w.pt: these are weights of a CLIP whose text tower is a language model"):
        load_pair(create_pair(), tmp_path / "w.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_that_is_taken_is_named(layout):
    assert find_family(sorted(LAYOUTS[layout](create_theirs().state_dict()))) is None


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "patchrank_clip_b16", "patchrank_clip_digits"])
def test_towers_of_clip_are_not_named(name):
    with torch.device("meta"):
        keys = sorted(timm.create_model(name, num_classes=512).state_dict())
    assert find_family(keys) is None


def test_a_clip_that_does_not_fit_keeps_its_own_error(tmp_path):
    """A tower's own kinds of weights tell nothing of another family either."""
    broken = hugging_face(create_theirs().state_dict())
    del broken["vision_model.post_layernorm.bias"]
    torch.save(broken, tmp_path / "w.pt")
    with pytest.raises(UserError, match="w.pt: norm.bias is missing$"):
        load_pair(create_pair(), tmp_path / "w.pt")
    scaled = create_tower(init_values=1e-5, pre_norm=False)
    for prefix in ("", "visual.", "visual.trunk."):
        left = {f"{prefix}{key}": value for key, value in scaled.state_dict().items() if key != "norm.bias"}
        torch.save(left, tmp_path / "w.pt")
        with pytest.raises(UserError, match="w.pt: norm.bias is missing$"):
            load_tower(scaled, tmp_path / "w.pt")
