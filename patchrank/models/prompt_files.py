"""Prompts files: a prompt layer's weights, and the pair of towers that it was tuned with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from patchrank.config import PromptConfig
from patchrank.io.tensor_file import read_tensors, write_tensors
from patchrank.layers.prompts import PROMPTS, Prompts, create_prompt
from patchrank.models.pruning_cfg import canonical_pruning
from patchrank.utils.errors import UserError

SETTINGS = ("mode", "num_tokens", "text_width", "image_width", "bias", "classes")  # of the layer, in every file
DEFAULT = PromptConfig().name  # the layer of files that name none
MODEL = ("name", "sha256", "blocks_sha256")  # of the pair, and of its image tower alone
MAX_FOUND = 160  # characters of what a file holds, so that errors stay short


def save_prompts(prompts: Prompts, path: str | Path, about: Mapping) -> None:
    """Writes prompts and what they belong to, whole or not at all; `load_prompts` reads it back.

    Args:
        about: `model` and `pruning` as `describe` gives them, and whatever else is worth knowing, as plain values.

    Raises:
        UserError: the class of the prompts is not registered, or nothing can be written there.
    """
    settings = {
        "mode": prompts.mode,
        "num_tokens": prompts.num_tokens,
        "text_width": prompts.text.shape[-1],
        "image_width": prompts.image_dim,
        "bias": prompts.bias,
        "classes": prompts.classes,
        "num_norms": 0 if prompts.norm_gains is None else len(prompts.norm_gains),
    }
    name = PROMPTS.name_of(prompts)
    if name != DEFAULT:
        settings["name"] = name
    write_tensors(path, "prompts", prompts.state_dict(), {**about, **settings})


def describe(clip: nn.Module) -> dict:
    """The pair that prompts are tuned with, and the pruning in force, for `save_prompts`."""
    model = {"name": clip.name, "sha256": clip.sha256(), "blocks_sha256": clip.visual.blocks_sha256()}
    return {"model": model, "pruning": canonical_pruning(clip.visual.pruning)}


def load_prompts(path: str | Path) -> tuple[Prompts, dict]:
    """The prompts in a file and what was said about them; never unpickles.

    The prompts keep it as `about`, so that a tower can refuse prompts of another tower.

    Raises:
        UserError: the file is missing, damaged, of another kind, of a prompt layer that is not registered, or its
            tensors and metadata do not fit together.
    """
    source = f"prompts file {path}"
    tensors, about = read_tensors(path, "prompts", (*SETTINGS, "model", "pruning"))
    try:
        _check_kinds(about)
        with torch.device("meta"):  # takes no memory, whatever sizes the metadata asks for
            expected = {key: tuple(value.shape) for key, value in _create(about).state_dict().items()}
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: its metadata describes no prompts ({str(error).splitlines()[0]})") from error
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != expected:
        raise UserError(f"{source}: its tensors are {str(found)[:MAX_FOUND]}, but its metadata says {expected}")
    for key, value in tensors.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{source}: {key} must hold finite numbers alone")
    prompts = _create(about)
    prompts.load_state_dict(tensors)
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
            f"{prompts.source}: of mode T, which has no visual part for an image tower; try create_clip(..., "
            "prompts=FILE), which puts it into a text tower"
        )
    return prompts


def check_tower(tower: nn.Module, prompts: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
    """Refuses prompts that were tuned with another image tower, as their file says; prompts from no file always pass.

    Args:
        weights: what the tower is about to load, in place of the weights that it has.

    Raises:
        UserError: names both towers.
    """
    theirs = getattr(prompts, "about", {}).get("model")
    if theirs and theirs["blocks_sha256"] not in (known := tower.known_as(weights)):
        raise UserError(
            f"{prompts.source}: tuned with {theirs['name']}, whose image tower has weights "
            f"{theirs['blocks_sha256'][:12]}, but this tower's weights are {known[0][:12]}{tower.precision_note()}"
        )


def check_pair(clip: nn.Module, prompts: Prompts) -> None:
    """Refuses prompts that were tuned with another pair, as their file says, and prompts of another width.

    Raises:
        UserError: names both pairs, or both widths.
    """
    theirs = prompts.about.get("model")
    if theirs and theirs["sha256"] not in (known := clip.known_as()):
        says = f"tuned with {theirs['name']} with weights {theirs['sha256'][:12]}"
        ours = f"{clip.name} with {known[0][:12]}{clip.precision_note()}"
        raise UserError(f"{prompts.source}: {says}, but this model is {ours}")
    width, own_width = prompts.text.shape[-1], getattr(clip.text, "width", None)
    if width != own_width:
        raise UserError(f"{prompts.source}: of text width {width}, but the text tower of {clip.name} has {own_width}")


def _check_kinds(about: Mapping) -> None:
    """Raises `TypeError` or `KeyError` for a value of another kind than `save_prompts` writes."""
    if not all(isinstance(about["model"][key], str) for key in MODEL) or not isinstance(about["pruning"], dict):
        raise TypeError(f"model needs {', '.join(MODEL)} and pruning its settings")
    classes = about["classes"]
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise TypeError("classes must be a list of names or null")
    sizes = [about["num_tokens"], about["text_width"], about.get("num_norms", 0)]
    if about["mode"] != "T":
        sizes.append(about["image_width"])
    if any(type(size) is not int for size in sizes):
        raise TypeError("num_tokens and widths must be whole numbers")


def _create(about: Mapping) -> Prompts:
    """A prompt layer as metadata describes it, with weights that mean nothing yet."""
    return create_prompt(
        about.get("name", DEFAULT),
        about["mode"],
        about["num_tokens"],
        about["text_width"],
        about["image_width"],
        classes=about["classes"],
        bias=bool(about["bias"]),
        num_norms=about.get("num_norms", 0),
    )
