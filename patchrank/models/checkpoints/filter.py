"""From the weights of a file to what a tower loads; messages name the first key or shape that does not fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import cache
from typing import NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn

from patchrank.layers.predictors import awaits_weights
from patchrank.models.checkpoints.families import naming_family
from patchrank.models.checkpoints.key_maps import to_pair
from patchrank.models.checkpoints.unwrap import unwrap
from patchrank.utils.errors import UserError

PREDICTOR = "pruner."


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module, source: str = "weights") -> dict[str, Tensor]:
    """What timm's builder loads into a tower: the image tower of any layout that `to_pair` knows.

    A text tower is left out. If the weights have no predictor, the one in use stays. Head and first convolution may
    have other shapes where timm adapts them.

    Raises:
        UserError: no weights of CLIP, or of another architecture, which is named; or a key that does not fit.
    """
    config, adapted = _config(model), []
    if model.num_classes != config.get("num_classes", model.num_classes):
        adapted += ["head.weight", "head.bias"]
    if model.in_chans != config.get("input_size", (model.in_chans,))[0]:
        adapted += ["patch_embed.proj.weight"]
    tensors = unwrap(state_dict, source)
    with naming_family(tensors, model.state_dict(), source):
        return tower_weights(to_pair(tensors, source).visual, model, source, adapted)


def tower_weights(
    visual: Mapping[str, Tensor],
    model: nn.Module,
    source: str = "weights",
    adapted: Collection[str] = (),
    called: Mapping[str, str] = {},
) -> dict[str, Tensor]:
    """The state dict for a tower: an image tower's weights, and a predictor's. Nothing is loaded here.

    Positions are resampled only for a tower that was made for another image size than its entry's own.

    Args:
        visual: by timm's names, as in `Pair.visual`.
        source: what errors call the weights.
        adapted: keys whose shapes are not checked, since timm will adapt them.
        called: what errors call some keys, in place of timm's names.

    Raises:
        UserError: another architecture, or a key that is missing, surplus or of another shape.
    """
    weights = with_predictor(dict(visual), model, source)
    if _is_resized(weights, model):
        weights = vit_checkpoint_filter_fn(weights, model)
    _check_shape(weights, model, source, adapted)
    check_keys(weights, model.state_dict(), source, adapted, called)
    return weights


def check_keys(
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    source: str,
    adapted: Collection[str] = (),
    called: Mapping[str, str] = {},
) -> None:
    """Raises `UserError` that names the first key in which weights (`theirs`) differ from a model's (`ours`)."""
    wrong = []
    for key in sorted((set(ours) | set(theirs)) - set(adapted)):
        name = called.get(key, key)
        if key not in theirs:
            wrong.append(f"{name} is missing")
        elif key not in ours:
            wrong.append(f"{name} is surplus")
        elif theirs[key].shape != ours[key].shape:
            wrong.append(f"{name} has shape {tuple(theirs[key].shape)}, not {tuple(ours[key].shape)}")
        elif theirs[key].is_floating_point() != ours[key].is_floating_point():
            wrong.append(f"{name} is of {theirs[key].dtype}, not {ours[key].dtype}")
    if wrong:
        more = f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        raise UserError(f"{source}: {wrong[0]}{more}")


def with_predictor(weights: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """The weights, with a predictor's if the tower has one, and without any if it has none."""
    own = {key: value for key, value in model.state_dict().items() if key.startswith(PREDICTOR)}
    brought = {key: value for key, value in weights.items() if key.startswith(PREDICTOR)}
    if not brought and awaits_weights(model):
        raise UserError(f"{source}: brings no predictor ({PREDICTOR}*), but this tower's predictor_init awaits one")
    predictor = brought if brought and own and model.pruning.predictor_path is None else own
    return {key: value for key, value in weights.items() if not key.startswith(PREDICTOR)} | predictor


def _is_resized(weights: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether the weights' positions are on the grid of the tower's entry, but the tower has another grid."""
    patches, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    patch, config = model.patch_embed.patch_size, _config(model)
    if patches is None or positions is None or patches.shape[2:] != patch or positions.ndim != 3:
        return False
    entry = get_pretrained_cfg(config.get("architecture") or "")
    sizes = [config.get("input_size", (0, 0, 0))[-2:], entry.input_size[-2:] if entry else (0, 0)]
    grids = {tuple(pixels // side for pixels, side in zip(size, patch)) for size in sizes} - {
        model.patch_embed.grid_size
    }
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    return positions.shape[1] - prefix in map(math.prod, grids)


def _config(model: nn.Module) -> dict:
    """timm's record of a tower's entry; {} for a tower that was made without an entry."""
    return getattr(model, "pretrained_cfg", None) or {}


class TowerShape(NamedTuple):
    """The shape of a vision transformer, as far as weights show it: not heads, activation or the norms' epsilon."""

    width: int
    patch: int
    layers: int
    positions: int
    outputs: int

    def image_side(self) -> int | None:
        """Pixels of a side of the images, with one class token; None where they are no squares."""
        side = math.isqrt(max(self.positions - 1, 0))
        return side * self.patch if side * side == self.positions - 1 else None

    def __str__(self) -> str:
        patches = max(self.positions - 1, 0)  # all but the class token
        side = math.isqrt(patches)
        grid = f"grid {side} x {side}" if side * side == patches else f"{self.positions} positions"
        return f"width {self.width}, patch {self.patch}, {self.layers} layers, {grid}, {self.outputs} outputs"


def tower_shape(weights: Mapping[str, Tensor]) -> TowerShape | None:
    """The shape of an image tower by timm's names; None where keys that show it are missing."""
    patches, positions, head = (weights.get(key) for key in ("patch_embed.proj.weight", "pos_embed", "head.weight"))
    if patches is None or positions is None or patches.ndim != 4 or positions.ndim != 3:
        return None
    layers = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    outputs = 0 if head is None else head.shape[0]
    return TowerShape(patches.shape[0], patches.shape[-1], len(layers), positions.shape[1], outputs)


@cache
def _entry_shapes() -> dict[str, TowerShape | None]:
    """The shape of every entry of ours."""
    entries = timm.list_models("patchrank_clip_*")
    with torch.device("meta"):  # towers without content
        return {entry: tower_shape(timm.create_model(entry, weight_init="skip").state_dict()) for entry in entries}


def _check_shape(weights: Mapping[str, Tensor], model: nn.Module, source: str, adapted: Collection[str]) -> None:
    """Raises `UserError` for another architecture, with the entries of ours that would fit."""
    theirs, ours = tower_shape(weights), tower_shape(model.state_dict())
    if theirs is None or ours is None:
        return
    compared = ours._replace(outputs=theirs.outputs) if "head.weight" in adapted or not theirs.outputs else ours
    if theirs != compared:
        name = _config(model).get("architecture") or "this tower"
        fits = [entry for entry, shape in _entry_shapes().items() if shape == theirs]
        if theirs._replace(positions=0) == compared._replace(positions=0) and (side := theirs.image_side()):
            # the same architecture, trained on images of that side
            is_entry = name in _entry_shapes()
            fits.append(f"img_size={side} (--img-size {side})" if is_entry else f"image_size {side} in its config")
        fits = " or ".join(fits) or "none of our entries"
        raise UserError(f"{source}: a vision transformer of {theirs}, but {name} has {ours}; {fits} would fit")
