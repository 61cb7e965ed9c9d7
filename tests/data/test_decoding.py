import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from helpers.image_files import encoded, pixels, trap
from PIL import Image

from patchrank.data import decoding
from patchrank.data.decoding import decode_plain, decode_viewer, extension_of, fault, image_extensions

# EXIF: the sides of the upright picture at which row 0 and column 0 of the stored one lie
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def shown(content: bytes) -> np.ndarray:
    image = decode_viewer(content)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera writes that says this of its orientation."""
    rows, columns = SIDES[orientation]
    if "bottom" in (rows, columns):
        upright = upright[::-1]
    if "right" in (rows, columns):
        upright = upright[:, ::-1]
    return np.ascontiguousarray(upright.swapaxes(0, 1) if rows in ("left", "right") else upright)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(float)[..., None] / 255
    return colour * share + 255 * (1 - share)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def raw_exif(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + b"".join(entries) + bytes(4)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand, with chunks that Pillow would not write."""
    header = struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    framed = (struct.pack(">L", len(b)) + k + b + struct.pack(">L", zlib.crc32(k + b)) for k, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("options", [{"quality": 30}, {"quality": 95, "progressive": True, "subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_without_orientation_are_the_same_to_both_decoders(mode, options):
    content = encoded(Image.fromarray(pixels(37, 51)).convert(mode), "JPEG", **options)
    assert np.array_equal(shown(content), np.asarray(decode_plain(content)))
    upright = encoded(Image.fromarray(pixels(37, 51)).convert(mode), "JPEG", exif=exif(1), **options)
    assert np.array_equal(shown(upright), shown(content))


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_every_orientation_comes_upright(orientation, kind, options):
    upright = pixels()
    content = encoded(stored(upright, orientation), kind, exif=exif(orientation), **options)
    assert np.array_equal(shown(content), upright)


@pytest.mark.parametrize("orientation", SIDES)
def test_every_orientation_of_a_jpeg_comes_upright(orientation):
    blocks = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[0, 0, 0], [250, 250, 250], [250, 250, 0]]], np.uint8)
    upright = blocks.repeat(16, 0).repeat(16, 1)
    content = encoded(stored(upright, orientation), "JPEG", quality=95, subsampling=0, exif=exif(orientation))
    assert np.abs(shown(content) - upright).max() < 12


def test_an_orientation_beside_malformed_tags_is_followed():
    turned, odd = struct.pack("<HHLHH", 0x112, 3, 1, 6, 0), struct.pack("<HHLl", 0x100, 9, 1, -5)
    content = encoded(kind="JPEG", exif=raw_exif(turned, odd))
    assert decode_viewer(content).size == (8, 12) and decode_plain(content).size == (12, 8)


@pytest.mark.parametrize("tags", [b"Exif\0\0XX*\0abcdefgh", raw_exif(struct.pack("<HHLHH", 0x112, 3, 1, 9, 0))])
def test_damaged_or_unknown_orientations_change_nothing(tags):
    content = encoded(kind="JPEG", exif=tags)
    assert np.array_equal(shown(content), np.asarray(decode_plain(content)))


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_of_an_animation_the_first_frame_is_shown(kind, options):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "lime", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert (shown(content) == [255, 0, 0]).all()


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_transparency_is_shown_on_white(kind, options):
    rgba = pixels(channels=4)
    assert np.abs(shown(encoded(rgba, kind, **options)) - on_white(rgba[..., :3], rgba[..., 3])).max() <= 1


def test_grey_with_alpha_is_shown_on_white():
    both = pixels(channels=2)
    expected = on_white(both[..., :1].repeat(3, 2), both[..., 1])
    assert np.abs(shown(encoded(Image.fromarray(both, "LA"))) - expected).max() <= 1


def test_palettes_with_transparency_are_shown_on_white():
    places, colours = pixels(channels=1)[..., 0] % 4, pixels(4, 1)[:, 0]
    image = Image.fromarray(places, "P")
    image.putpalette(colours.tobytes())
    assert np.array_equal(shown(encoded(image)), colours[places])
    alpha = np.array([0, 128, 255, 255], np.uint8)
    some = shown(encoded(image, transparency=alpha[:2].tobytes()))
    assert np.abs(some - on_white(colours[places], alpha[places])).max() <= 1
    one = shown(encoded(image, "GIF", transparency=2))
    assert np.array_equal(one, np.where(places[..., None] == 2, 255, colours[places]))


def test_a_colour_that_stands_for_transparency_is_white():
    rgb = np.array([[[10, 20, 30], [10, 20, 31]]], np.uint8)
    assert shown(encoded(rgb, transparency=(10, 20, 30))).tolist() == [[[255] * 3, [10, 20, 31]]]
    grey = np.array([[7, 8]], np.uint8)
    assert shown(encoded(grey, transparency=7)).tolist() == [[[255] * 3, [8] * 3]]


def test_grey_and_one_bit_become_rgb():
    grey = pixels()[..., 0]
    assert np.array_equal(shown(encoded(grey)), grey[..., None].repeat(3, 2))
    bits = Image.fromarray((grey > 128).astype(np.uint8) * 255).convert("1")
    assert np.array_equal(shown(encoded(bits)), (grey > 128)[..., None].repeat(3, 2) * 255)


DEEP = np.array([[0, 128, 257, 1000], [30000, 40000, 65000, 65535]])


@pytest.mark.parametrize(
    "content",
    [
        encoded(DEEP.astype(np.uint16), "PNG"),
        encoded(DEEP.astype(np.uint16), "TIFF"),
        encoded(Image.frombytes("I;16B", (4, 2), DEEP.astype(">u2").tobytes()), "TIFF"),
        encoded(DEEP.astype(np.int32), "TIFF"),
        encoded(DEEP.astype(np.float32), "TIFF"),
    ],
    ids=["png", "tiff", "big-endian", "32-bit", "float"],
)
def test_deep_grey_is_scaled_not_clipped(content):
    assert np.array_equal(shown(content), np.rint(DEEP / 257).astype(int)[..., None].repeat(3, 2))


@pytest.mark.parametrize("white", [1, 255])
def test_floats_are_scaled_from_the_range_that_holds_them(white):
    values = np.array([[0, 0.25, 0.5, 1], [np.nan, -3, np.inf, 1]], np.float32) * white
    expected = [[0, 64, 128, 255], [0, 0, 0, 255]]
    assert np.abs(shown(encoded(values, "TIFF"))[..., 0] - expected).max() <= 1


def test_deep_png_in_colour_and_with_a_transparent_grey():
    deep = np.arange(2 * 3 * 3).reshape(2, 3, 3) * 3500
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    assert np.abs(shown(png(3, 2, 16, 2, rows)) - deep / 257).max() <= 1
    rows = b"\0" + np.array([1000, 1001, 65535], ">u2").tobytes()
    assert shown(png(3, 1, 16, 0, rows, (b"tRNS", struct.pack(">H", 1000))))[0, :, 0].tolist() == [255, 4, 255]


def test_cmyk_jpegs_have_ink_where_they_say():
    inks = np.array([[[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)
    image = Image.fromarray(inks.repeat(16, 0).repeat(16, 1), "CMYK")
    colours = [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0], [255, 255, 255]]
    for content in (encoded(image, "JPEG", quality=95, subsampling=0), encoded(image, "TIFF")):
        assert np.abs(shown(content)[8, 8::16] - colours).max() < 8


def test_ycck_jpegs_are_read_as_adobe_writes_them():
    """The same four channels, declared as YCCK: the first three are luma and chromas of the inks, black is inverted."""
    luma, blue, red, light = 180, 90, 150, 200
    image = Image.new("CMYK", (16, 16), tuple(255 - value for value in (luma, blue, red, light)))
    content = encoded(image, "JPEG", quality=100, subsampling=0)
    transform = content.index(b"Adobe") + len(b"Adobe") + 6
    assert content[transform] == 0
    blue, red = blue - 128, red - 128
    inks = luma + np.array([1.402 * red, -0.344136 * blue - 0.714136 * red, 1.772 * blue])
    result = shown(content[:transform] + b"\2" + content[transform + 1 :])
    assert np.abs(result - (255 - inks) * light / 255).max() < 4


def test_lab_becomes_rgb():
    lab = Image.frombytes("LAB", (2, 1), bytes([255, 0, 0, 137, 0, 0]))  # white, and half as bright to the eye
    assert np.abs(shown(encoded(lab, "TIFF"))[0] - [[255] * 3, [128] * 3]).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_files_that_are_cut_off_are_faulty(kind):
    content = encoded(pixels(64, 64), kind)
    assert fault(content, "viewer") is None and fault(content, "plain") is None
    for decoder in ("viewer", "plain"):
        assert "\n" not in fault(content[: len(content) // 2], decoder)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"this is no image, whatever its name says\n" * 9, "in no image format that can be read"),
        (png(60_000, 60_000, 8, 2, b""), "exceeds limit of 178956970 pixels, could be decompression bomb"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "in no image format that can be read"),
    ],
    ids=["empty", "text", "bomb", "postscript"],
)
def test_what_is_no_image_says_so(content, reason):
    assert reason in fault(content, "viewer") and reason in fault(content, "plain")


def test_a_pickle_is_no_image_and_is_not_opened(tmp_path):
    assert fault(trap(tmp_path / "opened"), "viewer") == "in no image format that can be read"
    assert not (tmp_path / "opened").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the filter that Pillow's remarks have met
@pytest.mark.parametrize("seed", range(6))
def test_damage_is_a_fault_or_a_picture_but_never_another_error(seed):
    rng = np.random.default_rng(seed)
    files = [
        encoded(pixels(24, 24), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TGA", "PCX", "ICO")
    ]
    for content in files * 5:
        damaged = bytearray(content)
        for place in rng.integers(0, min(300, len(content)), 8):
            damaged[place] = rng.integers(256)
        reason = fault(bytes(damaged), "viewer")
        assert reason is None or (reason and "\n" not in reason)


def test_remarks_on_metadata_are_no_noise():
    decoding.silence_metadata_warnings.cache_clear()
    entry = struct.pack("<HHLHH", 0x112, 3, 2, 6, 1)  # two orientations where one may be
    content = encoded(kind="JPEG", exif=raw_exif(entry))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_viewer(content).size == (8, 12)
    with pytest.warns(UserWarning, match="too many entries"):
        Image.open(io.BytesIO(content)).getexif().get(0x112)


def test_extensions_are_those_of_pictures():
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".jp2", ".mpo"} <= image_extensions()
    assert not {".pdf", ".eps", ".h5", ".mpg", ".txt", ".tar", ".pkl"} & image_extensions()
    assert extension_of(encoded(kind="JPEG")) == "jpg" and extension_of(encoded(kind="WEBP")) == "webp"
