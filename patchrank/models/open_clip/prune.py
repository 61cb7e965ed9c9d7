"""Pruning of a model that was made with open_clip, and its undoing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import VisionTransformer as NativeVisionTransformer
from open_clip.utils import to_2tuple
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from patchrank.layers.pooling import POOLS
from patchrank.models.open_clip.convert import create_visual, strange_features
from patchrank.models.open_clip.visual import OpenClipTrunk, OpenClipVisual
from patchrank.models.pair import Clip
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.utils.errors import UserError
from patchrank.utils.private_names import is_compiled

CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}  # open_clip's resize modes, and timm's


def prune_open_clip(model: nn.Module, predictor: nn.Module | None = None, **pruning) -> nn.Module:
    """Replaces the image tower of an open_clip model by ours, which is `model.visual.trunk` from then on.

    Weights are shared, not copied. Everything else of the model works as before: `encode_image`, `encode_text`,
    `lock_image_tower`, checkpoints by the model's own names (without the predictor, which has a file of its own).
    Make optimizers afterwards, since class token, positions and projection become parameters of another shape. If the
    model is pruned already, this changes the settings, as `model.visual.trunk.set_pruning` does.

    Args:
        model: open_clip's `CLIP` or `CustomTextCLIP`, whose image tower is open_clip's `VisionTransformer`, pooled by
            the class token, or timm's, pooled by class token, average or attention (SigLIP).
        predictor: a fitted predictor to rank by, instead of a file.
        **pruning: fields of `patchrank.models.pruning_cfg.Pruning`; without any, nothing is pruned yet.

    Returns:
        The model that was given, changed in place.

    Raises:
        UserError: something else than an open_clip model, an image tower that ours cannot reproduce, or impossible
            settings; the model is then as it was.
    """
    check_kind("prune_open_clip", model)
    visual = getattr(model, "visual", None)
    if (trunk := pruned_trunk(model)) is not None:
        trunk.set_pruning(predictor=predictor, **pruning)
        return model
    for feature in strange_parts(visual):
        raise UserError(
            f"prune_open_clip cannot take this image tower: {feature}; it takes open_clip's VisionTransformer, pooled "
            "by the class token, and timm's"
        )
    is_timm = isinstance(visual, TimmModel)
    if is_timm:
        trunk = OpenClipTrunk.around(visual.trunk)
    else:
        ours = create_visual(visual, **{key: pruning[key] for key in ("locations",) if key in pruning})
        trunk = ours.trunk
    trunk.pretrained_cfg = trunk.default_cfg = {**getattr(trunk, "pretrained_cfg", {}), **_transform_cfg(visual)}
    trunk.set_pruning(predictor=predictor, **pruning)
    if is_timm:
        visual.trunk = trunk
    else:
        model.visual = ours
    return model


def unprune(model: nn.Module) -> nn.Module:
    """Undoes `prune_open_clip`: the model has its own image tower again, with the weights as they are now.

    Raises:
        UserError: the model is not pruned, or layers of its tower were replaced meanwhile.
    """
    check_kind("unprune", model)
    trunk = pruned_trunk(model)
    if trunk is None:
        raise UserError(f"unprune needs a model from prune_open_clip, but this {type(model).__name__} is not")
    if isinstance(model.visual, OpenClipVisual):
        model.visual = model.visual.give_back()
    else:
        model.visual.trunk = trunk.give_back()
    return model


def check_kind(function: str, model: object, takes: str = "a model of open_clip") -> None:
    """Refuses, in the name of a function, what people have in place of open_clip's model, or of what it takes.

    Raises:
        UserError: says what to pass instead.
    """
    if (cure := _instead_of(model)) is not None:
        kind = type(model)
        raise UserError(f"{function} takes {takes}, but got {kind.__module__}.{kind.__name__}; {cure}")


def _instead_of(model: object) -> str | None:
    """What to do with something that is known not to be open_clip's model; None for all else."""
    same = "try open_clip.create_model('ViT-B-16-quickgelu', pretrained='openai'), which has the same weights"
    if not isinstance(model, nn.Module):
        return "pass the model itself, as open_clip.create_model makes it"
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "pass its .module, and wrap the model afterwards"
    if type(model).__name__ == "OptimizedModule":
        return "pass the model as it was before torch.compile"
    if isinstance(model, torch.jit.ScriptModule) or type(model).__module__ == "clip.model":  # OpenAI's package
        return same
    if hasattr(model, "vision_model"):  # of transformers
        return "try patchrank.prune, which takes it, or patchrank.create_clip(NAME, checkpoint=FILE)"
    if isinstance(model, Clip):
        return "this pair is patchrank's own, so use clip.visual.set_pruning"
    if isinstance(model, PrunedVisionTransformer):
        return "this tower is patchrank's own, so use its set_pruning"
    if isinstance(model, (VisionTransformer, NativeVisionTransformer)):
        return "pass the whole model, not its image tower; for one of timm try timm.create_model('patchrank_clip_b16')"
    return None


def pruned_trunk(model: nn.Module) -> OpenClipTrunk | None:
    """The tower that `prune_open_clip` put into a model; None if the model is not pruned."""
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    return trunk if isinstance(trunk, OpenClipTrunk) else None


def open_clip_configs() -> Path:
    """Folder of open_clip model configs that name our towers, for `open_clip.add_model_config`.

    They are for training with open_clip: `patchrank-ViT-B-16` (OpenAI's shape) and `patchrank-digits`. `quick_gelu` in
    a config is the text tower's, since the timm entry decides on the image tower's activation. For published weights
    load an open_clip model of its own, and then use `prune_open_clip`.
    """
    return Path(__file__).parent / "configs"


def _transform_cfg(visual: nn.Module) -> dict:
    """What open_clip's evaluation transform does, in timm's words."""
    stated = getattr(visual, "preprocess_cfg", None) or {}
    cfg = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(size=visual.image_size), stated))
    size = to_2tuple(cfg.size)
    square = size[0] == size[1] or cfg.resize_mode != "shortest"
    return {
        "input_size": (3, *size),
        "mean": tuple(cfg.mean) if isinstance(cfg.mean, (list, tuple)) else (cfg.mean,) * 3,
        "std": tuple(cfg.std) if isinstance(cfg.std, (list, tuple)) else (cfg.std,) * 3,
        # "random" is for training; and open_clip's way to sizes that are not square is bicubic whatever is asked for
        "interpolation": "bilinear" if cfg.interpolation == "bilinear" and square else "bicubic",
        "crop_pct": 1.0,
        "crop_mode": CROP_MODES[cfg.resize_mode],
    }


def strange_parts(visual: nn.Module | None) -> Iterator[str]:
    """Names of everything in an image tower that ours cannot reproduce."""
    for module in (visual, getattr(visual, "trunk", None)):
        if module is not None and ("forward" in vars(module) or is_compiled(module)):
            yield "compiled or patched forward"
    if type(visual) is TimmModel:
        yield from _strange_timm(visual.trunk)
    elif type(visual) is NativeVisionTransformer:
        yield from strange_features(visual)
    else:
        yield "none at all" if visual is None else type(visual).__name__


def _strange_timm(trunk: nn.Module) -> Iterator[str]:
    if type(trunk) not in (VisionTransformer, PrunedVisionTransformer):
        yield f"timm's {type(trunk).__name__}"
        return
    if not trunk.global_pool or trunk.global_pool not in POOLS:  # without any there is no embedding
        yield f"timm_pool {trunk.global_pool!r}"
    if type(trunk.patch_embed) is not PatchEmbed:
        yield f"patch embedding {type(trunk.patch_embed).__name__}"
    if not isinstance(trunk.patch_drop, nn.Identity):
        yield "patch_dropout"
    if trunk.dynamic_img_size:
        yield "dynamic_img_size"
