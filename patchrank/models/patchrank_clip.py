"""CLIP's image towers with token pruning, as timm entrypoints.

An entry is an architecture; its tag decides weights, activation, mean and std, also at `pretrained=False`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from timm.layers import LayerNorm, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor

from patchrank.models.checkpoints.filter import checkpoint_filter_fn
from patchrank.models.checkpoints.hub import ensure_reachable
from patchrank.models.checkpoints.load import read_checkpoint
from patchrank.models.pretrained import PUBLISHED, WEIGHTS, Weights, find_weights, record_input_size
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.models.repair_files import check_repair
from patchrank.utils.errors import UserError
from patchrank.utils.plain import plain
from patchrank.utils.private_names import update_model_args

HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm looks for in a hub repository, in this order


def _cfg(weights: Weights) -> dict:
    return {
        "url": "",
        "file": weights.file and str(weights.file),
        "hf_hub_id": weights.hub_id,
        "num_classes": weights.num_classes,
        "input_size": (3, weights.image_size, weights.image_size),
        "pool_size": None,
        "crop_pct": 1.0,  # timm says 0.9 for some, which is not what OpenAI and open_clip evaluate with
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": weights.mean,
        "std": weights.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": weights.license,
    }


default_cfgs = generate_default_cfgs({name: _cfg(weights) for name, weights in PUBLISHED.items()})


def _create(variant: str, pretrained: bool, kwargs: dict, **shape) -> PrunedVisionTransformer:
    """An entry's tower; `kwargs` of the caller win over its `shape`."""
    kwargs = {name: plain(value) for name, value in (shape | kwargs).items()}
    check_img_size(kwargs.get("img_size"), kwargs["patch_size"])
    asked = kwargs.pop("pretrained_cfg", None)
    if isinstance(asked, str) and asked:
        find_weights(f"{variant}.{asked}")  # which says more than timm of a tag that does not exist
    cfg = resolve_pretrained_cfg(variant, asked, kwargs.pop("pretrained_cfg_overlay", None))
    repo = None if cfg.state_dict or cfg.file else cfg.hf_hub_id  # timm takes those, whatever else a cfg names
    if pretrained and repo:
        files = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else HUB_FILES
        ensure_reachable(repo, files, kwargs.get("cache_dir"))
    act_layer = _weights_of(variant, repo, cfg.tag).act_layer
    kwargs = dict(pre_norm=True, norm_layer=partial(LayerNorm, eps=1e-5), act_layer=act_layer) | kwargs
    out_indices = kwargs.pop("out_indices", 3)
    file = None if cfg.state_dict or cfg.source == "local-dir" else cfg.file
    model = build_model_with_cfg(
        PrunedVisionTransformer,
        variant,
        pretrained,
        pretrained_cfg=replace(cfg, state_dict={"file": file}) if file else cfg,  # so that timm leaves it unread
        pretrained_filter_fn=partial(_read_and_filter, file) if file else checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )
    if file:
        model.pretrained_cfg["state_dict"] = None
    record_input_size(model)
    update_model_args(model, act_layer=kwargs["act_layer"])  # so that a tower that is saved comes back with it
    if pretrained and not kwargs.get("features_only"):  # timm takes a layer off those, and with it their fingerprint
        model.check_predictor()
        model.check_prompts()
        check_repair(model)
    return model


def _read_and_filter(file: str, _: dict, model: PrunedVisionTransformer) -> dict[str, Tensor]:
    """A file of weights, read by the same rules as all checkpoints: timm's reader knows fewer formats."""
    return checkpoint_filter_fn(read_checkpoint(file), model, f"checkpoint {file}")


def check_img_size(img_size: object, patch_size: int | tuple[int, int]) -> None:
    """Raises `UserError` for an image size that is none, or smaller than a patch; None is the entry's own size."""
    if img_size is None:
        return
    sides, least = to_2tuple(img_size), to_2tuple(patch_size)
    if len(sides) != 2 or any(type(side) is not int or side < patch for side, patch in zip(sides, least)):
        needed = f"a side of at least {max(least)} pixels (one patch), or (height, width)"
        raise UserError(f"img_size must be {needed}, but is {img_size!r}")


def _weights_of(variant: str, repo: str | None, tag: str) -> Weights:
    """The published weights that a cfg means, by its hub repository or tag; the default tag's where neither tells."""
    of_entry = [weights for weights in PUBLISHED.values() if weights.entry == variant]
    by_repo = [weights for weights in of_entry if repo and weights.hub_id == repo.partition("@")[0]]
    by_tag = [weights for weights in of_entry if weights.tag == tag]
    return (by_repo + by_tag + of_entry)[0]


@register_model
def patchrank_clip_digits(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """The embedded default: 64 x 64 images, 8 x 8 = 64 tokens, 12 layers of width 64; weights ship."""
    if pretrained:
        kwargs.setdefault("predictor_path", str(WEIGHTS / "patchrank_clip_digits.predictor.safetensors"))
    return _create("patchrank_clip_digits", pretrained, kwargs, patch_size=8, embed_dim=64, depth=12, num_heads=4)


@register_model
def patchrank_clip_b16(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """CLIP ViT-B/16: 14 x 14 = 196 tokens, 512-d embeddings."""
    return _create("patchrank_clip_b16", pretrained, kwargs, patch_size=16, embed_dim=768, depth=12, num_heads=12)


@register_model
def patchrank_clip_b32(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """CLIP ViT-B/32: 7 x 7 = 49 tokens, 512-d embeddings."""
    return _create("patchrank_clip_b32", pretrained, kwargs, patch_size=32, embed_dim=768, depth=12, num_heads=12)


@register_model
def patchrank_clip_l14(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """CLIP ViT-L/14: 16 x 16 = 256 tokens, 768-d embeddings."""
    return _create("patchrank_clip_l14", pretrained, kwargs, patch_size=14, embed_dim=1024, depth=24, num_heads=16)


@register_model
def patchrank_clip_l14_336(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """CLIP ViT-L/14 at 336 x 336: 24 x 24 = 576 tokens, 768-d embeddings."""
    return _create("patchrank_clip_l14_336", pretrained, kwargs, patch_size=14, embed_dim=1024, depth=24, num_heads=16)


@register_model
def patchrank_clip_xsmall16(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """TinyCLIP ViT-8M/16: 14 x 14 = 196 tokens, 512-d embeddings."""
    return _create("patchrank_clip_xsmall16", pretrained, kwargs, patch_size=16, embed_dim=256, depth=10, num_heads=4)


@register_model
def patchrank_clip_medium32(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """TinyCLIP ViT-40M/32: 7 x 7 = 49 tokens, 512-d embeddings."""
    return _create("patchrank_clip_medium32", pretrained, kwargs, patch_size=32, embed_dim=512, depth=12, num_heads=8)


@register_model
def patchrank_clip_medium16(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """TinyCLIP ViT-39M/16: 14 x 14 = 196 tokens, 512-d embeddings."""
    return _create("patchrank_clip_medium16", pretrained, kwargs, patch_size=16, embed_dim=512, depth=12, num_heads=8)


@register_model
def patchrank_clip_betwixt32(pretrained: bool = False, **kwargs) -> PrunedVisionTransformer:
    """TinyCLIP ViT-61M/32: 7 x 7 = 49 tokens, 512-d embeddings."""
    return _create("patchrank_clip_betwixt32", pretrained, kwargs, patch_size=32, embed_dim=640, depth=12, num_heads=10)
