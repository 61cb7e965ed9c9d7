"""The server that docs/export.md shows, run as it is printed."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.image_files import encoded, write
from PIL import Image

from patchrank.data.dataset_factory import load_split
from patchrank.data.digits import scenes
from patchrank.export.answers import main as print_answers
from patchrank.export.write import export_tower
from patchrank.models.clip import create_clip

PAGE = (Path(__file__).parents[2] / "docs/export.md").read_text()
(SERVER,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "HTTPServer" in code)


def answer(content: bytes, patience: float = 60) -> str:
    end = time.monotonic() + patience
    while True:
        try:
            return urllib.request.urlopen("http://127.0.0.1:18431", content).read().decode()
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def shown(image: Image.Image, size: tuple[int, int], turn: int = 1) -> bytes:
    """A picture as a file of another size, stored turned where EXIF says so: 6 and 8 by a quarter, 3 by a half."""
    exif, back = Image.Exif(), {1: 0, 3: 180, 6: 90, 8: 270}
    exif[0x112] = turn
    return encoded(image.resize(size).rotate(back[turn], expand=True), exif=exif)


def pictures(split) -> list[bytes]:
    """Digits as they are, and the same of odd shapes and turned."""
    shapes = [((97, 80), 1), ((64, 91), 1), ((131, 130), 6), ((70, 99), 8), ((33, 40), 3), ((300, 211), 6)]
    images = [split.image(i) for i in range(len(split))]
    return [encoded(image) for image in images] + [shown(image, *how) for image in images for how in shapes]


@pytest.mark.slow
def test_the_server_answers_what_the_picture_shows_and_image_prints(tmp_path, capsys):
    clip = create_clip("patchrank_clip_digits", keep_rate=0.6)
    export_tower(clip, tmp_path / "digits.onnx", scenes.CLASSES, scenes.TEMPLATES, uint8=True)
    lines = [line for line in SERVER.splitlines() if line.strip()]
    assert SERVER.count("8000") == 1 and len(lines) <= 20 and max(map(len, lines)) <= 120 and ";" not in SERVER
    script = SERVER.replace("8000", "18431")
    assert set(re.findall(r"^(?:import|from) (.*?)(?: import .*)?$", script, re.M)) == {
        "io, json", "http.server", "numpy, onnxruntime", "PIL"
    }  # fmt: skip
    split = load_split("digits", "val", 8)
    paths = [write(tmp_path / f"{i}.png", content) for i, content in enumerate(pictures(split))]
    assert print_answers(["--check", str(tmp_path / "digits.onnx"), "--image", *map(str, paths)]) == 0
    printed = [json.loads(line)["class"] for line in capsys.readouterr().out.splitlines()]
    server = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        found = [answer(path.read_bytes()) for path in paths]
    finally:
        server.kill()
        server.wait()
    seen = [label for label in split.labels for _ in range((len(paths) - len(split)) // len(split))]
    assert found == printed == [scenes.CLASSES[label] for label in (*split.labels, *seen)]
