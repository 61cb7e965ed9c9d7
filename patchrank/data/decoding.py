"""From encoded bytes to RGB: as the protocols of named datasets do it, or as a viewer shows it."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image


def decode_plain(content: bytes) -> Image.Image:
    """What Dassl, CLIP and open_clip do: Pillow's own conversion to RGB, whatever the file says of its orientation."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def extension_of(content: bytes) -> str:
    """The usual file extension of encoded bytes: "jpg", "png", ..., whatever their file was called."""
    kind = Image.open(io.BytesIO(content)).format.lower()
    return {"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind)


DECODERS: dict[str, Callable[[bytes], Image.Image]] = {"plain": decode_plain}
