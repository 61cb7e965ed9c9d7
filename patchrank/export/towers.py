"""The model that a file is made from, or was made from; without its text tower where nothing asks for text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import timm
from torch import nn

from patchrank.models.checkpoints.load import load_tower
from patchrank.models.clip import Clip, create_clip
from patchrank.models.pretrained import find_weights, is_clip_entry
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.utils.errors import UserError

PATHS = {"predictor": "predictor_path", "repair": "repair_path"}  # settings by their flags


def create_pair(args: argparse.Namespace, name: str, with_text: bool, settings: Mapping) -> Clip:
    """A pair in evaluation mode, on the CPU, with the files that flags name.

    Where neither classes nor learned tokens ask for a text tower, a CLIP entry of ours comes without one, and open_clip
    is not imported.

    Args:
        name: as `create_clip` takes it.
        settings: pruning settings and `img_size`, as the entry takes them.

    Raises:
        UserError: as `create_clip` does.
    """
    settings = dict(settings) | {key: path for flag, key in PATHS.items() if (path := getattr(args, flag)) is not None}
    if with_text or args.prompts is not None or not is_clip_entry(name):
        return create_clip(name, checkpoint=args.checkpoint, prompts=args.prompts, **settings)
    find_weights(name)  # which says more than timm of a tag that does not exist
    tower = timm.create_model(name, pretrained=args.checkpoint is None, **settings).eval()
    if args.checkpoint is not None:
        load_tower(tower, args.checkpoint)
    return Clip(name, tower, None).eval()


def pair_of(model: nn.Module) -> Clip:
    """A pair, or an image tower of ours as a pair without a text tower. Raises `UserError` for anything else."""
    if isinstance(model, Clip):
        return model
    if not isinstance(model, PrunedVisionTransformer):
        what = "a pair of create_clip or one of our towers of timm.create_model"
        raise UserError(f"export_tower takes {what}, but got a {type(model).__name__}")
    return Clip(_name_of(model), model, None).train(model.training)


def _name_of(tower: PrunedVisionTransformer) -> str:
    """The name by which `create_clip` makes such a tower; the class of a model that was made otherwise."""
    cfg, (original,) = tower.pretrained_cfg, getattr(tower, "original", (tower,))
    if not cfg.get("architecture"):
        return type(original).__name__
    name = ".".join(part for part in (cfg["architecture"], cfg.get("tag")) if part)
    return name if name.startswith("patchrank_") else f"timm:{name}"
