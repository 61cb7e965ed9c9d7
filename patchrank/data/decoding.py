"""From encoded bytes to RGB: as CLIP's and CoOp's code decodes them, or as a viewer shows them."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image

from patchrank.utils.errors import one_line

# Formats that Pillow knows by name but cannot read, and EPS, for which it would start another program.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Pillow's own ImageOps.exif_transpose fails on malformed tags of some cameras.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_plain(content: bytes) -> Image.Image:
    """What Dassl, CLIP and open_clip do: Pillow's own conversion to RGB, whatever the file says of its orientation."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def decode_viewer(content: bytes) -> Image.Image:
    """The picture that a viewer shows: the first frame, upright, on white where it is transparent.

    Grey of more than 8 bits is scaled, not clipped: integers from 0..65535, floats from the least of 0..1, 0..255 and
    0..65535 that holds them all. Colour profiles are not applied, since CLIP's own transforms apply none. A JPEG in
    colour or grey without an orientation gives exactly what `decode_plain` gives.

    Raises:
        Exception: the bytes are no image, or a damaged one; a part of an image is never returned. Pillow's errors are
            of nearly every kind for files that are cut off, of no known format, or past its guard against bombs.
    """
    silence_metadata_warnings()
    image = Image.open(io.BytesIO(content), formats=image_formats())
    image.load()
    if 0 in image.size:
        raise ValueError("the image has no pixels")
    shown = _eight_bits(image)
    if shown.has_transparency_data:
        shown = shown.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a damaged tag; Pillow has turned TIFF files upright already
        turn = None
    shown = shown.convert("RGB")
    return shown if turn is None else shown.transpose(turn)


DECODERS: dict[str, Callable[[bytes], Image.Image]] = {"plain": decode_plain, "viewer": decode_viewer}


def fault(content: bytes, decoding: str) -> str | None:
    """In one line why encoded bytes cannot be decoded in full; None if they can."""
    try:
        DECODERS[decoding](content)
    except Exception as error:
        return why(error, content)
    return None


def why(error: Exception, content: bytes) -> str:
    """A decoder's error in one line, for the bytes that it was given."""
    if not content:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):  # its own text is the address of a buffer
        return "in no image format that can be read"
    return one_line(error)


def extension_of(content: bytes) -> str:
    """The usual file extension of encoded bytes by their format: "jpg", "png", ..."""
    kind = Image.open(io.BytesIO(content)).format.lower()
    return {"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind)


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it can decode by itself, in the order in which it tries them."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _NO_PICTURES)


@functools.cache
def image_extensions() -> frozenset[str]:
    """Extensions of image files, as ".jpg", in lower case."""
    readable = {*image_formats(), "MPO"}  # Pillow opens MPO as JPEG
    return frozenset(end for end, name in Image.registered_extensions().items() if name in readable)


@functools.cache
def silence_metadata_warnings() -> None:
    """Turns off Pillow's warnings of damaged metadata; once, since all threads share Python's filters."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as 8 bits; other images as they are."""
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image).astype(np.float32)
    values[~np.isfinite(values)] = 0
    ranges = (65535,) if image.mode[0] == "I" else (1, 255, 65535)
    white = next((end for end in ranges if values.max() <= end), ranges[-1])
    if isinstance(image.info.get("transparency"), int):
        values[values == image.info["transparency"]] = white
    return Image.fromarray(np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8))
