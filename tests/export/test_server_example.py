"""The server that docs/export.md shows, run as it is printed."""

import io
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from patchrank.data.dataset_factory import load_split
from patchrank.data.digits import scenes
from patchrank.export.write import export_tower
from patchrank.models.clip import create_clip

PAGE = (Path(__file__).parents[2] / "docs/export.md").read_text()
(SERVER,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def answer(content: bytes, patience: float = 60) -> str:
    end = time.monotonic() + patience
    while True:
        try:
            return urllib.request.urlopen("http://127.0.0.1:18431", content).read().decode()
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@pytest.mark.slow
def test_the_server_answers_what_the_picture_shows(tmp_path):
    clip = create_clip("patchrank_clip_digits", keep_rate=0.6)
    export_tower(clip, tmp_path / "digits.onnx", scenes.CLASSES, scenes.TEMPLATES, uint8=True)
    assert SERVER.count("8000") == 1 and len(SERVER.strip().splitlines()) <= 20
    script = SERVER.replace("8000", "18431")
    assert set(re.findall(r"^(?:import|from) (.*?)(?: import .*)?$", script, re.M)) == {
        "io, json", "http.server", "numpy, onnxruntime", "PIL"
    }  # fmt: skip
    server = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        split = load_split("digits", "val", 8)
        for i in range(len(split)):
            content = io.BytesIO()
            split.image(i).save(content, "PNG")
            assert answer(content.getvalue()) == scenes.CLASSES[split.labels[i]]
    finally:
        server.kill()
        server.wait()
