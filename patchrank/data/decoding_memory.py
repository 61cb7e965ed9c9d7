"""How much memory decoding an image and resizing it takes, told from its header before any pixel is read."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress

from PIL import Image, TiffImagePlugin

LIMIT = 512 << 20  # bytes that an image may take beside its encoded ones
SIDE = 1024  # pixels of a tower's side, the largest that resizing is reckoned with
JPEGS = ("JPEG", "MPO")  # an MPO is a JPEG with more pictures behind it

# Bytes a pixel that decoders hold beside the picture, at the most, as measured with Pillow 13. A format that is not
# here, and may be decoded in Python, is taken to hold OTHERS.
DECODERS = {"AVIF": 16, "BMP": 0, "DIB": 0, "GIF": 1, "JPEG2000": 32, "PCX": 1, "PPM": 8, "PSD": 4}
DECODERS |= {"SGI": 4, "TGA": 0, "WEBP": 12}
OTHERS = 24
ICON = 32  # bytes a pixel of an image in an icon
ICO = b"\0\0\1\0"  # how such a file starts
TEXTS = 64 << 20  # bytes that Pillow lets the texts of a PNG take

# Bytes a pixel of the picture and of its copies on the way to RGB, by Pillow's mode.
PICTURES = {"RGB": 4, "1": 5, "L": 5, "P": 5, "CMYK": 8, "YCbCr": 8, "LAB": 8, "HSV": 8, "RGBX": 8, "RGBA": 12}
DEEP_OR_TRANSPARENT = 16


def open_image(content: bytes, formats: Sequence[str]) -> Image.Image:
    """An image in one of these formats, whose pixels are not decoded yet.

    Raises:
        Exception: as Pillow's `Image.open`; a `ValueError` where an icon would take more memory than `LIMIT`.
    """
    if content.startswith(ICO):  # which Pillow decodes while it opens the file
        for inner in _icons(content, [start for (start,) in struct.iter_unpack("<12xL", _ico_table(content))]):
            _check(inner, ICON * inner.width * inner.height)
    return Image.open(io.BytesIO(content), formats=formats)


def fits(image: Image.Image, content: bytes, turned: bool = False) -> bool:
    return peak_bytes(image, content, turned) <= LIMIT


def check_memory(image: Image.Image, content: bytes, turned: bool = False) -> None:
    """Raises `ValueError` for an opened image for which `peak_bytes` is more than `LIMIT`."""
    _check(image, peak_bytes(image, content, turned))


def check_copy(image: Image.Image) -> None:
    """Raises `ValueError` for a decoded image that does not fit beside a copy of it in RGB."""
    _check(image, 8 * image.width * image.height)


def _check(image: Image.Image, need: int) -> None:
    if need > LIMIT:
        size = f"{image.width:,} x {image.height:,} pixels ({image.width * image.height / 1e6:.1f} megapixels"
        raise ValueError(
            f"decoding {size}, {image.format}) and resizing for towers of up to {SIDE:,} pixels a side may take "
            f"{need >> 20:,} MiB, but the limit is {LIMIT >> 20}; try a smaller copy"
        )


def peak_bytes(image: Image.Image, content: bytes, turned: bool = False) -> int:
    """Bytes that decoding an opened image to RGB, and resizing its shorter side to `SIDE` pixels, take at the most.

    Args:
        content: the encoded bytes, which do not count.
        turned: whether it is turned upright, which takes a copy.
    """
    pixels, (short, long) = image.width * image.height, sorted(image.size)
    picture = PICTURES.get(image.mode, DEEP_OR_TRANSPARENT)
    if "transparency" in image.info or (image.palette and image.palette.mode == "RGBA"):
        picture = DEEP_OR_TRANSPARENT
    if turned:
        picture = max(picture, 8)
    resized = 4 * SIDE * (short + SIDE) * long // max(short, 1)  # after one direction, and after both
    return pixels * picture + _decoder_bytes(image, content) + resized


def _decoder_bytes(image: Image.Image, content: bytes) -> int:
    """Bytes that a format's decoder holds beside the picture."""
    pixels = image.width * image.height
    if image.format in JPEGS:
        scale = image.decoderconfig[0] if image.decoderconfig else 1
        return 0 if _is_one_scan(image, content) else 2 * image.layers * pixels * scale**2
    if image.format == "PNG":
        return TEXTS + (8 * pixels if image.is_animated else 0)
    if image.format == "TIFF":
        return 0 if image.tile[0][0] == "raw" else 8 * _tiff_block(image)
    if image.format == "ICNS":
        inner = _icons(content, [start for start, _ in image.icns.dct.values()])
        return ICON * max((each.width * each.height for each in inner), default=pixels)
    return pixels * DECODERS.get(image.format, OTHERS)


def _tiff_block(image: Image.Image) -> int:
    """Pixels of a TIFF file's largest strip or tile, which its decoder holds; a tile may be larger than the picture."""
    names = TiffImagePlugin.ROWSPERSTRIP, TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH
    values = (image.tag_v2.get(name) for name in names)
    rows, width, length = (value if isinstance(value, int) else 0 for value in values)
    return max(image.width * min(rows or image.height, image.height), width * length)


def _is_one_scan(image: Image.Image, content: bytes) -> bool:
    """Whether a JPEG is decoded row by row; one of several scans is held as coefficients of two bytes.

    Pillow stops reading behind the first scan's header, which is 6 bytes long and 2 for each layer.
    """
    length = 6 + 2 * image.layers
    start = image.fp.tell() - length
    return "progressive" not in image.info and content[start : start + 3] == bytes([0, length, image.layers])


def _ico_table(content: bytes) -> bytes:
    """The entries of an ICO file, each of 16 bytes that end with where its image starts."""
    table = content[6 : 6 + 16 * int.from_bytes(content[4:6], "little")]
    return table[: len(table) // 16 * 16]


def _icons(content: bytes, starts: Sequence[int]) -> Iterator[Image.Image]:
    """The images in an icon file, opened but not decoded: its own header does not tell how large they are."""
    for start in starts:
        with suppress(Image.UnidentifiedImageError):  # old kinds of images, which are small
            yield Image.open(io.BytesIO(content[start:]), formats=("PNG", "DIB", "JPEG2000"))
