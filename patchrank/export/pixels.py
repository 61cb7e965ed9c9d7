"""From a picture to what an exported file takes: resized, cropped, normalised. Needs no torch.

Gives number for number what timm's evaluation transform does of the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image

from patchrank.utils.errors import UserError

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
CROPS = ("center", "squash")


def check_input(settings: Mapping) -> None:
    """Raises `UserError` for a preparation of images that is not known here."""
    for name, known in (("crop_mode", CROPS), ("interpolation", FILTERS)):
        if settings[name] not in known:
            raise UserError(
                f"images of this model are prepared with {name} {settings[name]!r}, which a file cannot be given here; "
                "try the model's own transform, and arrays in place of pictures"
            )


def to_pixels(image: Image.Image, settings: Mapping) -> np.ndarray:
    """A picture (RGB) resized and cropped: (H, W, 3), uint8.

    Args:
        settings: of the file's `input`: `size` (height, width), `crop_pct`, `crop_mode` and `interpolation`.

    Raises:
        UserError: a way of cropping or resizing that is not known here.
    """
    check_input(settings)
    height, width = settings["size"]
    tall, wide = (math.floor(side / settings["crop_pct"]) for side in (height, width))
    if settings["crop_mode"] == "center":
        tall, wide = _covering(image, tall, wide)
    if (wide, tall) != image.size:
        image = image.resize((wide, tall), FILTERS[settings["interpolation"]])
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def to_input(image: Image.Image, settings: Mapping) -> np.ndarray:
    """A picture (RGB) as one image of a batch for the file: uint8 (1, H, W, 3), or normalised float32 (1, 3, H, W)."""
    pixels = to_pixels(image, settings)
    if settings["dtype"] == "uint8":
        return pixels[None]
    mean, std = (np.asarray(settings[name], np.float32)[:, None, None] for name in ("mean", "std"))
    values = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return ((values - mean) / std)[None]


def _covering(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """Height and width of a picture whose sides are scaled alike, so that it just covers a box."""
    wide, tall = image.size
    if height == width:  # as torchvision's Resize of one number does: the longer side is rounded down
        if wide <= tall:
            return int(height * tall / wide), height
        return height, int(height * wide / tall)
    ratio = min(tall / height, wide / width)
    return round(tall / ratio), round(wide / ratio)
