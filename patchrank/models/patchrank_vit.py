"""Image towers that are not CLIP's, with token pruning, as timm entrypoints: SigLIP, DINOv2, ViT and DeiT.

Each is one of timm's own entries, with its tags, weights, image size, mean and std. There is no text tower: SigLIP's
comes from open_clip or transformers, and ViT and DeiT have a classifier.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor

from patchrank.models.checkpoints.filter import check_keys, with_predictor
from patchrank.models.checkpoints.hub import ensure_reachable
from patchrank.models.checkpoints.load import read_checkpoint
from patchrank.models.patchrank_clip import HUB_FILES, check_img_size
from patchrank.models.pretrained import record_input_size
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.utils.plain import plain

THEIRS = {  # our entries by timm's
    "patchrank_siglip_b16_224": "vit_base_patch16_siglip_224",
    "patchrank_siglip_b16_256": "vit_base_patch16_siglip_256",
    "patchrank_siglip_b16_384": "vit_base_patch16_siglip_384",
    "patchrank_siglip_so400m14_224": "vit_so400m_patch14_siglip_224",
    "patchrank_siglip_so400m14_384": "vit_so400m_patch14_siglip_384",
    "patchrank_dinov2_s14": "vit_small_patch14_dinov2",
    "patchrank_dinov2_b14": "vit_base_patch14_dinov2",
    "patchrank_dinov2_l14": "vit_large_patch14_dinov2",
    "patchrank_dinov2_s14_reg4": "vit_small_patch14_reg4_dinov2",
    "patchrank_dinov2_b14_reg4": "vit_base_patch14_reg4_dinov2",
    "patchrank_dinov2_l14_reg4": "vit_large_patch14_reg4_dinov2",
    "patchrank_vit_b16": "vit_base_patch16_224",
    "patchrank_deit_s16": "deit_small_patch16_224",
}


def _cfgs(entry: str, theirs: str) -> dict:
    """timm's records of an entry's weights, under our name; files that timm would unpickle are left out."""
    found = get_arch_pretrained_cfgs(theirs)
    return {
        f"{entry}.{cfg.tag}": replace(cfg, url=None, custom_load=False, architecture=None, tag=None)
        for cfg in found.values()
    }


default_cfgs = generate_default_cfgs(
    {name: cfg for entry, theirs in THEIRS.items() for name, cfg in _cfgs(entry, theirs).items()}
)


def _create(variant: str, pretrained: bool, kwargs: dict, **shape) -> PrunedVisionTransformer:
    """An entry's tower; `kwargs` of the caller win over its `shape`."""
    kwargs = {name: plain(value) for name, value in (shape | kwargs).items()}
    check_img_size(kwargs.get("img_size"), kwargs["patch_size"])
    cfg = resolve_pretrained_cfg(
        variant, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    )
    if pretrained and cfg.hf_hub_id and not (cfg.state_dict or cfg.file):
        ensure_reachable(cfg.hf_hub_id, HUB_FILES, kwargs.get("cache_dir"))
    file = None if cfg.state_dict or cfg.source == "local-dir" else cfg.file
    model = build_model_with_cfg(
        PrunedVisionTransformer,
        variant,
        pretrained,
        pretrained_cfg=replace(cfg, state_dict={"file": file}) if file else cfg,  # so that timm leaves it unread
        pretrained_filter_fn=partial(_filtered, file),
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **kwargs,
    )
    if file:
        model.pretrained_cfg["state_dict"] = None
    record_input_size(model)
    if pretrained and not kwargs.get("features_only"):
        model.check_predictor()
    return model


def _filtered(file: str | None, weights: dict, model: PrunedVisionTransformer) -> dict[str, Tensor]:
    """What a tower loads: weights by timm's names, or a file of them, and the predictor that is in use.

    Raises:
        UserError: a file that cannot be read, or a key that does not fit.
    """
    found = vit_checkpoint_filter_fn(read_checkpoint(file) if file else weights, model)
    source = f"checkpoint {file}" if file else "weights"
    found, adapted = with_predictor(found, model, source), ()
    if model.num_classes != (model.pretrained_cfg or {}).get("num_classes", model.num_classes):
        adapted = ("head.weight", "head.bias")  # timm makes a new head
    check_keys(found, model.state_dict(), source, adapted)
    return found


def _siglip(variant: str, pretrained: bool, kwargs: dict, **shape) -> PrunedVisionTransformer:
    return _create(variant, pretrained, kwargs, class_token=False, global_pool="map", **shape)


@register_model
def patchrank_siglip_b16_224(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """SigLIP B/16: 14 x 14 = 196 tokens, pooled by attention."""
    return _siglip("patchrank_siglip_b16_224", pretrained, kwargs, patch_size=16, embed_dim=768, depth=12, num_heads=12)


@register_model
def patchrank_siglip_b16_256(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """SigLIP B/16: 16 x 16 = 256 tokens, pooled by attention."""
    return _siglip("patchrank_siglip_b16_256", pretrained, kwargs, patch_size=16, embed_dim=768, depth=12, num_heads=12)


@register_model
def patchrank_siglip_b16_384(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """SigLIP B/16: 24 x 24 = 576 tokens, pooled by attention."""
    return _siglip("patchrank_siglip_b16_384", pretrained, kwargs, patch_size=16, embed_dim=768, depth=12, num_heads=12)


SO400M = dict(patch_size=14, embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362)


@register_model
def patchrank_siglip_so400m14_224(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """SigLIP SO400M/14: 16 x 16 = 256 tokens, pooled by attention."""
    return _siglip("patchrank_siglip_so400m14_224", pretrained, kwargs, **SO400M)


@register_model
def patchrank_siglip_so400m14_384(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """SigLIP SO400M/14: 27 x 27 = 729 tokens, pooled by attention."""
    return _siglip("patchrank_siglip_so400m14_384", pretrained, kwargs, **SO400M)


def _dinov2(variant: str, pretrained: bool, kwargs: dict, **shape) -> PrunedVisionTransformer:
    registers = dict(reg_tokens=4, no_embed_class=True) if variant.endswith("_reg4") else {}
    return _create(variant, pretrained, kwargs, patch_size=14, init_values=1e-5, **registers, **shape)


@register_model
def patchrank_dinov2_s14(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """DINOv2 S/14: 37 x 37 = 1,369 tokens of images of 518 pixels; `img_size=224` has 256."""
    return _dinov2("patchrank_dinov2_s14", pretrained, kwargs, embed_dim=384, depth=12, num_heads=6)


@register_model
def patchrank_dinov2_b14(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """DINOv2 B/14."""
    return _dinov2("patchrank_dinov2_b14", pretrained, kwargs, embed_dim=768, depth=12, num_heads=12)


@register_model
def patchrank_dinov2_l14(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """DINOv2 L/14."""
    return _dinov2("patchrank_dinov2_l14", pretrained, kwargs, embed_dim=1024, depth=24, num_heads=16)


@register_model
def patchrank_dinov2_s14_reg4(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """DINOv2 S/14 with four registers."""
    return _dinov2("patchrank_dinov2_s14_reg4", pretrained, kwargs, embed_dim=384, depth=12, num_heads=6)


@register_model
def patchrank_dinov2_b14_reg4(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """DINOv2 B/14 with four registers."""
    return _dinov2("patchrank_dinov2_b14_reg4", pretrained, kwargs, embed_dim=768, depth=12, num_heads=12)


@register_model
def patchrank_dinov2_l14_reg4(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """DINOv2 L/14 with four registers."""
    return _dinov2("patchrank_dinov2_l14_reg4", pretrained, kwargs, embed_dim=1024, depth=24, num_heads=16)


@register_model
def patchrank_vit_b16(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """ViT B/16, a classifier: 14 x 14 = 196 tokens."""
    return _create("patchrank_vit_b16", pretrained, kwargs, patch_size=16, embed_dim=768, depth=12, num_heads=12)


@register_model
def patchrank_deit_s16(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """DeiT S/16, a classifier: 14 x 14 = 196 tokens."""
    return _create("patchrank_deit_s16", pretrained, kwargs, patch_size=16, embed_dim=384, depth=12, num_heads=6)
