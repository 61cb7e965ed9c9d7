"""Prompts files: learned tokens, their map, and the pair of towers that they were tuned with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from patchrank.io.tensor_file import read_tensors, write_tensors
from patchrank.layers.prompts import Prompts
from patchrank.utils.errors import UserError

# what the prompts tell themselves
SHAPE = ("mode", "num_tokens", "text_width", "image_width", "bias", "classes")  # and num_norms, where there are any
MODEL = ("name", "sha256", "blocks_sha256")  # of the pair, and of its image tower alone
MAX_FOUND = 160  # characters of what a file holds, so that errors stay short
PRUNING = ("keep_rate", "locations", "drop_counts", "reducer", "leftovers")


def save_prompts(prompts: Prompts, path: str | Path, about: Mapping) -> None:
    """Writes prompts and what they belong to, whole or not at all; `load_prompts` reads it back.

    Args:
        about: `model` and `pruning` as `describe` gives them, and whatever else is worth knowing, as plain values.
    """
    write_tensors(path, "prompts", prompts.state_dict(), {**about, **_shape(prompts)})


def describe(clip: nn.Module) -> dict:
    """The pair that prompts are tuned with, and the pruning in force, for `save_prompts`."""
    pruning = {key: getattr(clip.visual.pruning, key) for key in PRUNING}
    model = {"name": clip.name, "sha256": clip.sha256(), "blocks_sha256": clip.visual.blocks_sha256()}
    return {"model": model, "pruning": {k: list(v) if isinstance(v, tuple) else v for k, v in pruning.items()}}


def load_prompts(path: str | Path) -> tuple[Prompts, dict]:
    """The prompts in a file and what was said about them; never unpickles.

    The prompts remember it as `about`, by which towers refuse those of others.

    Raises:
        UserError: the file is missing, damaged, of another kind, or tensors and metadata do not fit together.
    """
    source = f"prompts file {path}"
    tensors, about = read_tensors(path, "prompts", (*SHAPE, "model", "pruning"))
    try:
        expected = _expected(about)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{source}: its metadata describes no prompts ({error})") from error
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != expected:
        raise UserError(f"{source}: its tensors are {str(found)[:MAX_FOUND]}, but its metadata says {expected}")
    for key, value in tensors.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{source}: {key} holds what is no finite number")
    try:
        prompts = _create(about, tensors)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    prompts.about, prompts.source = about, source
    return prompts, about


def load_visual(path: str | Path) -> Prompts:
    """Prompts for an image tower alone.

    Raises:
        UserError: as `load_prompts`, or they have no visual part.
    """
    prompts, _ = load_prompts(path)
    if not prompts.inserts_visual:
        raise UserError(
            f"{prompts.source}: of mode T, which has no visual part for an image tower; create_clip(..., prompts=FILE) "
            "puts it into a text tower"
        )
    return prompts


def check_tower(tower: nn.Module, prompts: nn.Module) -> None:
    """Refuses prompts from a file that were tuned with another image tower; such as come from none may be anyone's.

    Raises:
        UserError: that names both.
    """
    theirs = getattr(prompts, "about", {}).get("model")
    if theirs and theirs["blocks_sha256"] != (own := tower.blocks_sha256()):
        raise UserError(
            f"{prompts.source}: tuned with {theirs['name']}, whose image tower has weights "
            f"{theirs['blocks_sha256'][:12]}, but this tower's weights are {own[:12]}"
        )


def check_pair(clip: nn.Module, prompts: Prompts) -> None:
    """Refuses prompts from a file that were tuned with another pair, and such as are of another width.

    Raises:
        UserError: that names both.
    """
    theirs = prompts.about.get("model")
    if theirs and theirs["sha256"] != (own := clip.sha256()):
        raise UserError(
            f"{prompts.source}: tuned with {theirs['name']} with weights {theirs['sha256'][:12]}, but this model is "
            f"{clip.name} with {own[:12]}"
        )
    width, own_width = prompts.text.shape[-1], getattr(clip.text, "width", None)
    if width != own_width:
        raise UserError(f"{prompts.source}: of text width {width}, but the text tower of {clip.name} has {own_width}")


def _shape(prompts: Prompts) -> dict:
    linear = prompts.to_visual
    return {
        "mode": prompts.mode,
        "num_tokens": prompts.num_tokens,
        "text_width": prompts.text.shape[-1],
        "image_width": None if linear is None else linear.out_features,
        "bias": linear is not None and linear.bias is not None,
        "classes": None if prompts.classes is None else list(prompts.classes),
        "num_norms": 0 if prompts.norm_gains is None else len(prompts.norm_gains),
    }


def _expected(about: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that metadata promises. Raises `TypeError` and its like where it is none of ours."""
    classes, widths = about["classes"], (about["image_width"], about["text_width"])
    if not all(isinstance(about["model"][key], str) for key in MODEL) or not isinstance(about["pruning"], dict):
        raise TypeError(f"model needs {', '.join(MODEL)} and pruning its settings")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise TypeError("classes must be a list of names or null")
    shapes = {"text": (*([] if classes is None else [len(classes)]), about["num_tokens"], about["text_width"])}
    if about["mode"] != "T":
        shapes["to_visual.weight"] = widths
        shapes |= {"to_visual.bias": widths[:1]} if about["bias"] else {}
    if about.get("num_norms"):
        shapes["norm_gains"] = (about["num_norms"], about["image_width"])
    if any(type(size) is not int for shape in shapes.values() for size in shape):
        raise TypeError("num_tokens and widths must be whole numbers")
    return shapes


def _create(about: Mapping, tensors: Mapping[str, Tensor]) -> Prompts:
    """Prompts as described, from tensors that are known to fit."""
    sizes = (about["num_tokens"], about["text_width"], about["image_width"])
    how = {"classes": about["classes"], "bias": bool(about["bias"]), "num_norms": about.get("num_norms", 0)}
    prompts = Prompts(about["mode"], *sizes, **how)
    with torch.no_grad():
        prompts.load_state_dict(tensors)
    return prompts
