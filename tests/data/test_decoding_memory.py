"""Decoding an image and resizing it takes at most 512 MiB, or it is left out and counted."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from helpers.coop_copies import make_named
from helpers.image_files import encoded, pixels, write
from PIL import Image

import patchrank
from patchrank.data import decoding_memory
from patchrank.data.dataset_factory import load_split
from patchrank.data.decoding import decode_plain, decode_viewer, fault
from patchrank.data.decoding_memory import LIMIT, peak_bytes
from patchrank.utils.errors import UserError
from patchrank.visualize.pictures import read_image

TOO_LARGE = "may take [0-9,]+ MiB, but the limit is 512; try a smaller copy$"


def png(width: int, height: int, depth: int = 8, colour: int = 2, *chunks: tuple[bytes, bytes], rows: int = 0) -> bytes:
    """A PNG file of any size, of which the first rows are there, all black."""
    row = bytes(1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7) // 8)
    header = struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(row * rows)), (b"IEND", b"")]
    framed = (struct.pack(">L", len(b)) + k + b + struct.pack(">L", zlib.crc32(k + b)) for k, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def tiff(width: int, height: int, tile: int) -> bytes:
    """The header of a grey TIFF file with one square tile."""
    rows = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in [*rows, (324, 8), (325, 8)])
    return b"II*\0" + struct.pack("<LH", 8, 10) + tags + bytes(4)


def icon(inner: bytes) -> bytes:
    """An ICO file that calls the image in it 16 pixels wide."""
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHLL", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def mac_icon(inner: bytes) -> bytes:
    part = b"ic10" + struct.pack(">L", 8 + len(inner)) + inner
    return b"icns" + struct.pack(">L", 8 + len(part)) + part


LARGE = {
    "thin": png(1, 60_000),
    "flat": png(60_000, 1),
    "one bit": png(13_000, 13_000, 1, 0),
    "colour": png(12_000, 12_000),
    "transparent": png(6_500, 6_500, 8, 6),
    "palette with transparency": png(6_000, 6_000, 1, 3, (b"PLTE", bytes(6)), (b"tRNS", b"\0")),
    "transparent colour": png(6_000, 6_000, 8, 2, (b"tRNS", bytes(6))),
    "deep grey": png(6_000, 6_000, 16, 0),
    "huge tile": tiff(64, 64, 16_384),
    "in an icon": icon(png(6_000, 6_000)),
    "in a mac's icon": mac_icon(png(6_000, 6_000)),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", LARGE)
def test_what_would_take_more_is_refused_before_a_pixel_is_read(name):
    content = LARGE[name]
    for decode in (decode_viewer, decode_plain):
        with pytest.raises(ValueError, match=TOO_LARGE):
            decode(content)


def test_thin_images_that_fit_are_images():
    assert decode_viewer(png(1, 100, rows=100)).size == (1, 100) and decode_viewer(png(4_000, 40, rows=40)).size == (
        4_000,
        40,
    )


def test_a_refusal_names_the_size_and_the_limit():
    said = fault(LARGE["thin"], "viewer")
    assert said == (
        "decoding 1 x 60,000 pixels (0.1 megapixels, PNG) and resizing for towers of up to 1,024 pixels a side "
        "may take 240,298 MiB, but the limit is 512; "
        "try a smaller copy"
    )


def jpeg(width: int, height: int, **options: object) -> bytes:
    return encoded(Image.new("RGB", (width, height), (200, 100, 50)), "JPEG", **options)


def test_a_photograph_that_does_not_fit_is_halved(monkeypatch):
    tags = Image.Exif()
    tags[0x112] = 6
    upright, turned = jpeg(900, 800), jpeg(900, 800, exif=tags)
    monkeypatch.setattr(decoding_memory, "LIMIT", opened(upright))
    assert decode_viewer(upright).size == (900, 800)
    halved = decode_viewer(turned)
    assert halved.size == (400, 450) and halved.getpixel((0, 0)) == (200, 100, 50)
    with pytest.raises(ValueError, match="JPEG"):  # others' code knows no halves
        decode_plain(jpeg(900, 800, progressive=True))


def test_a_png_that_says_behind_its_pixels_that_it_is_turned_needs_room_for_a_copy(monkeypatch):
    tags = Image.Exif()
    tags[0x112] = 6
    last = encoded(pixels(80, 90))[:-12]
    exif = tags.tobytes()[6:]
    chunk = struct.pack(">L", len(exif)) + b"eXIf" + exif + struct.pack(">L", zlib.crc32(b"eXIf" + exif))
    content = last + chunk + encoded(pixels(80, 90))[-12:]
    assert decode_viewer(content).size == (80, 90)
    monkeypatch.setattr(decoding_memory, "TEXTS", 0)
    monkeypatch.setattr(decoding_memory, "SIDE", 1)
    monkeypatch.setattr(decoding_memory, "LIMIT", 5 * 80 * 90)
    with pytest.raises(ValueError, match="90 x 80 pixels"):
        decode_viewer(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_photograph_of_100_megapixels_fits():
    header = jpeg(16, 16)
    size = header.index(b"\xff\xc0") + 5
    assert opened(header[:size] + struct.pack(">HH", 8_660, 11_548) + header[size + 4 :]) <= LIMIT


def opened(content: bytes) -> int:
    return peak_bytes(Image.open(io.BytesIO(content)), content)


def test_a_jpeg_of_several_scans_is_held_as_coefficients():
    plain, thumbnail = jpeg(800, 600), b"\xff\xe1" + struct.pack(">H", 20) + b"\xff\xda\0\x0c\x03" + bytes(13)
    progressive = jpeg(800, 600, progressive=True)
    assert opened(progressive) - opened(plain) == 800 * 600 * 6
    assert opened(plain[:2] + thumbnail + plain[2:]) == opened(plain)
    start = plain.index(b"\xff\xda\0\x0c\x03")
    one_by_one = plain[:start] + b"\xff\xda\0\x08\x01" + plain[start + 5 : start + 7] + b"\0\x3f\0"
    assert opened(one_by_one) == opened(progressive)


def test_an_image_that_does_not_fit_is_left_out_and_counted(tmp_path, capsys):
    for n in range(3):
        write(tmp_path / f"{n}.png", encoded(pixels(seed=n)))
    write(tmp_path / "thin.png", LARGE["thin"])
    split = load_split("folder", "all", None, str(tmp_path))
    assert sorted(split.ids) == ["0.png", "1.png", "2.png"] and split.skipped == 1
    assert "left out thin.png: decoding 1 x 60,000 pixels" in capsys.readouterr().err


def test_a_named_dataset_and_a_picture_to_look_at_stop_with_one_line(tmp_path):
    folder = make_named(tmp_path, "dtd")
    split = load_split("dtd", "test", None, str(tmp_path))
    write(folder / "images" / split.ids[0], LARGE["flat"])
    with pytest.raises(
        UserError, match=f"^dtd/test: image {split.ids[0]} cannot be decoded .*60,000 x 1 pixels[^\n]*$"
    ):
        split.image(0)
    with pytest.raises(UserError, match=r"^image .*thin.png: cannot be read \(decoding[^\n]*smaller copy\)$"):
        read_image(write(tmp_path / "thin.png", LARGE["thin"]))


MEASURE = """
import sys
import types
from pathlib import Path
from PIL import Image

package = types.ModuleType("patchrank")  # without the models, which take seconds to load
package.__path__ = sys.argv[1:2]
sys.modules["patchrank"] = package
from patchrank.data.decoding import decode_viewer

def kibibytes(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

def see(content):
    image = decode_viewer(content)
    image.resize([max(1, 1024 * side // min(image.size)) for side in image.size], Image.Resampling.BICUBIC)

for path in sys.argv[2:]:
    content = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kibibytes("VmRSS")
    see(content)
    print(1024 * (kibibytes("VmHWM") - before))
"""


def measured(folder, contents: list[bytes]) -> list[int]:
    """Bytes that decoding and resizing each of some files takes beside its own; the first one pays for imports."""
    paths = [write(folder / str(n), content) for n, content in enumerate([encoded(), *contents])]
    how = {"check": True, "capture_output": True, "text": True, "env": os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURE, *patchrank.__path__, *map(str, paths)], **how)
    return [int(line) for line in done.stdout.split()][1:]


TURNED = Image.Exif()
TURNED[0x112] = 6


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells what a decoder took")
def test_no_image_takes_more_than_is_reckoned(tmp_path):
    side = 1_000
    rgb, rgba = Image.new("RGB", (side, side), "red"), Image.new("RGBA", (side, side), "red")
    deep = np.random.default_rng(0).integers(1, 65_535, (side, side), dtype=np.uint16)
    contents = [
        png(4, 100, rows=100),
        png(side, side, 1, 0, rows=side),
        png(side, side, 8, 6, rows=side),
        png(side, side, 1, 3, (b"PLTE", bytes(6)), (b"tRNS", b"\0"), rows=side),
        encoded(deep),
        encoded(deep.astype(np.float32), "TIFF"),
        encoded(rgb, "TIFF", compression="tiff_adobe_deflate", strip_size=1 << 30),
        encoded(rgb, "PPM"),
        encoded(rgb, "JPEG"),
        encoded(rgb, "JPEG", exif=TURNED),
        encoded(rgb, "JPEG", progressive=True, subsampling=0),
        encoded(rgba.convert("CMYK"), "JPEG", progressive=True),
        encoded(rgb, "GIF", save_all=True, append_images=[rgba] * 3, transparency=0),
        encoded(rgba, "PNG", save_all=True, append_images=[rgb.convert("RGBA")] * 3, disposal=1),
        encoded(rgba, "WEBP", lossless=True, method=0),
        encoded(rgba, "AVIF", speed=10, subsampling="4:4:4"),
        encoded(rgba, "JPEG2000"),
    ]
    reckoned = [opened(content) for content in contents]
    reckoned[9] = peak_bytes(Image.open(io.BytesIO(contents[9])), contents[9], turned=True)
    for n, (taken, most) in enumerate(zip(measured(tmp_path, contents), reckoned)):
        assert most / 8 < taken < most + (2 << 20), n


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells what a decoder took")
def test_the_largest_images_that_fit_take_no_more_than_the_limit(tmp_path):
    contents = [
        png(6_000, 6_000, 8, 6, rows=6_000),
        jpeg(11_000, 11_000),
        jpeg(7_900, 7_900, exif=TURNED),
        jpeg(12_000, 9_000),
    ]
    assert LIMIT / 2 < min(measured(tmp_path, contents)) and max(measured(tmp_path, contents)) <= LIMIT
