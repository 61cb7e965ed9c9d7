"""How a model of transformers prepares images, in timm's words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from patchrank.models.model_name import IMAGES, PROCESSOR, read_settings
from patchrank.utils.errors import UserError, one_line

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
RESCALED = 1 / 255  # by which bytes become numbers in [0, 1]
HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
CROPPED = {"do_center_crop": True, "resample": 3}
CLIP = CROPPED | {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
DINOV2 = CROPPED | {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
DINOV2 |= {"size": {"shortest_edge": 256}, "crop_size": 224}
# What is done where a folder does not say it, by the beginning of its kind of processor, or else of its kind of model
USUAL = {"clip": CLIP, "bit": CLIP, "siglip": {"resample": 3} | HALF, "dinov2": DINOV2, "vit": {"resample": 2} | HALF}


def read_images(folder: Path, model_type: str, image_size: int, source: str) -> dict:
    """timm's record of how images are prepared: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.

    Args:
        folder: of the model; what its files do not say is as the model's own class has it.
        image_size: side in pixels of the images that its config is for.
        source: what errors begin with.

    Raises:
        UserError: a file that is no JSON, or asks for something that timm's transforms do not do.
    """
    stated = _stated(folder, source)
    written_by = stated.get("image_processor_type") or stated.get("feature_extractor_type") or model_type
    usual = next((usual for kind, usual in USUAL.items() if str(written_by).lower().startswith(kind)), USUAL["vit"])
    try:
        settings = {**usual, **{key: value for key, value in stated.items() if value is not None}}
        return _as_timm(settings, image_size)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        says = f"asks for images that timm's transforms do not make ({one_line(error)})"
        raise UserError(f"{source}: {IMAGES} {says}; try a folder without it") from error


def _stated(folder: Path, source: str) -> Mapping:
    """What a folder says of images; {} where it says nothing."""
    if (folder / IMAGES).is_file():
        return read_settings(folder / IMAGES, source)
    if (folder / PROCESSOR).is_file():
        found = read_settings(folder / PROCESSOR, source).get("image_processor")
        return found if isinstance(found, Mapping) else {}
    return {}


def _as_timm(settings: Mapping, image_size: int) -> dict:
    """Raises `ValueError`, `TypeError` or `KeyError` for what timm's transforms do not do."""
    scale = settings.get("rescale_factor", RESCALED) if settings.get("do_rescale", True) else 1.0
    if abs(scale - RESCALED) > 1e-6 or not settings.get("do_resize", True):
        raise ValueError(f"do_resize is {settings.get('do_resize', True)}, and bytes are scaled by {scale:g}")
    crops, normalised = settings.get("do_center_crop", False), settings.get("do_normalize", True)
    edge, is_shortest = _edge(settings.get("size") or image_size, crops)
    side = _side(settings.get("crop_size") or edge) if crops else edge
    return {
        "input_size": (3, side, side),
        "mean": _three(settings["image_mean"]) if normalised else (0.0,) * 3,
        "std": _three(settings["image_std"]) if normalised else (1.0,) * 3,
        "interpolation": RESAMPLING[settings["resample"]],
        "crop_pct": _crop_pct(side, edge),
        "crop_mode": "center" if is_shortest else "squash",
        "fixed_input_size": True,
    }


def _edge(size: int | Mapping, crops: bool) -> tuple[int, bool]:
    """To how many pixels images are resized, and whether that is their shorter side and not both."""
    if isinstance(size, Mapping) and "shortest_edge" not in size:
        return _side(size), False
    if not crops and isinstance(size, Mapping):
        raise ValueError("size is a shortest_edge, and nothing is cropped")
    return _side(size["shortest_edge"] if isinstance(size, Mapping) else size), crops


def _side(size: int | Mapping) -> int:
    """The side of a square."""
    sides = {size["height"], size["width"]} if isinstance(size, Mapping) else {size}
    if len(sides) > 1 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(f"{size} is no side of squares")
    return sides.pop()


def _crop_pct(side: int, edge: int) -> float:
    """The share by which timm, which rounds down, resizes to an edge of so many pixels."""
    share = side / edge
    return share if math.floor(side / share) == edge else side / (edge + 0.25)


def _three(values: float | Sequence[float]) -> tuple[float, ...]:
    """One value for each channel."""
    found = tuple(values) if isinstance(values, Sequence) else (values,) * 3
    if len(found) != 3 or not all(isinstance(value, int | float) for value in found):
        raise ValueError(f"{values} are no values of three channels")
    return found
