"""From encoded bytes to RGB: as CLIP's and CoOp's code decodes them, or as a viewer shows them."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image

from patchrank.data.decoding_memory import JPEGS, check_copy, check_memory, fits, open_image
from patchrank.utils.errors import one_line

# Formats that Pillow knows by name but cannot read; EPS, for which it would start another program; and two that wrap an
# image of any size, of which their own headers tell nothing.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF", "BLP", "IPTC"}

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
    """What Dassl, CLIP and open_clip do: Pillow's own conversion to RGB, whatever the file says of its orientation.

    Raises:
        Exception: as `decode_viewer`.
    """
    image = open_image(content, image_formats())
    check_memory(image, content)
    return _rgb(image)


def decode_viewer(content: bytes) -> Image.Image:
    """The picture that a viewer shows: the first frame, upright, on white where it is transparent.

    Grey of more than 8 bits is scaled, not clipped: integers from 0..65535, floats from the least of 0..1, 0..255 and
    0..65535 that holds them all. Colour profiles are not applied, since CLIP's own transforms apply none. A JPEG in
    colour or grey without an orientation gives exactly what `decode_plain` gives; one that would take more memory than
    an image may is decoded at half its size.

    Raises:
        Exception: the bytes are no image, or a damaged one; a part of an image is never returned. Pillow's errors are
            of nearly every kind for files that are cut off, of no known format, or past its guard against bombs; a
            `ValueError` says that decoding and resizing would take more memory than an image may.
    """
    silence_metadata_warnings()
    image = open_image(content, image_formats())
    turned = image.format != "PNG" and _turn(image) is not None  # a PNG may say it behind its pixels
    if image.format in JPEGS and not fits(image, content, turned):
        image.draft(None, (image.width // 2, image.height // 2))
    check_memory(image, content, turned)
    image.load()
    if 0 in image.size:
        raise ValueError("the image has no pixels")
    turn = _turn(image)
    if turn is not None:
        check_copy(image)
    shown = _eight_bits(image)
    if shown.has_transparency_data:
        shown = shown if shown.mode == "RGBA" else shown.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    shown = _rgb(shown)
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


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright; None where it is, or says nothing that can be read."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a damaged tag; Pillow has turned TIFF files upright already
        return None


def _rgb(image: Image.Image) -> Image.Image:
    """An image as RGB; one that is RGB already is not copied, since large ones would then not fit."""
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


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
    values /= white  # in place from here on, since large images would not fit twice
    np.clip(values, 0, 1, out=values)
    values *= 255
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))
