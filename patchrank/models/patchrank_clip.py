"""CLIP's image towers with token pruning, as timm entrypoints."""

from __future__ import annotations

from functools import partial

from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from patchrank.models.pretrained import checkpoint_filter_fn
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.models.tags import WEIGHTS, clip_cfg

default_cfgs = generate_default_cfgs(
    {
        "patchrank_clip_digits.embedded": clip_cfg(
            file=str(WEIGHTS / "patchrank_clip_digits.safetensors"), num_classes=64, input_size=(3, 64, 64)
        ),
        "patchrank_clip_b16.openai": clip_cfg(),
    }
)


def _create_patchrank_clip(variant: str, pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    out_indices = kwargs.pop("out_indices", 3)
    model = build_model_with_cfg(
        PrunedVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )
    if pretrained:
        getattr(model, "model", model).check_predictor()
    return model


@register_model
def patchrank_clip_digits(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """The embedded default: 64 x 64 images, 8 x 8 = 64 tokens, 12 layers of width 64; weights ship."""
    if pretrained:
        kwargs.setdefault("predictor_path", str(WEIGHTS / "patchrank_clip_digits.predictor.safetensors"))
    norm_layer = partial(LayerNorm, eps=1e-5)
    args = dict(img_size=64, patch_size=8, embed_dim=64, depth=12, num_heads=4, pre_norm=True, norm_layer=norm_layer)
    args |= dict(num_classes=64)
    return _create_patchrank_clip("patchrank_clip_digits", pretrained, **dict(args, **kwargs))


@register_model
def patchrank_clip_b16(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """CLIP ViT-B/16 as OpenAI trained it (quick GELU, 512-d embeddings): 14 x 14 = 196 tokens."""
    norm_layer = partial(LayerNorm, eps=1e-5)
    args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, pre_norm=True, norm_layer=norm_layer)
    args |= dict(act_layer="quick_gelu", num_classes=512)
    return _create_patchrank_clip("patchrank_clip_b16", pretrained, **dict(args, **kwargs))
