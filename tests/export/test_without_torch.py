"""What a file says of pictures where torch and all else of ours is not installed: numpy, Pillow, ONNX Runtime alone."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.image_files import encoded, pixels, write
from helpers.toy_exports import with_metadata
from PIL import Image

from patchrank.data.dataset_factory import load_split
from patchrank.data.decoding import decode_viewer
from patchrank.data.digits import scenes
from patchrank.export.answers import main as print_answers
from patchrank.export.answers import open_file
from patchrank.export.check import CheckedFile, compare
from patchrank.export.write import export_tower
from patchrank.models.clip import create_clip
from patchrank.models.embed import evaluate
from patchrank.utils.errors import UserError

ROOT = Path(__file__).parents[2]
NEEDED = ("numpy", "PIL", "onnxruntime")
REQUIREMENTS = ("numpy", "pillow", "onnxruntime")  # what these are called on the index


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs the command in a Python that finds the needed packages and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for name in NEEDED:
        place = Path(importlib.util.find_spec(name).origin).parent
        for found in (place, *place.parent.glob(f"{place.name}.libs"), *place.parent.glob("pillow.libs")):
            if not (folder / found.name).exists():
                (folder / found.name).symlink_to(found)

    def run(*args):
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
        command = [sys.executable, "-S", "-m", "patchrank.export", *map(str, args)]  # without its site-packages
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)

    return run


def rows(done) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def upside_down(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return encoded(image, "JPEG", exif=exif)


def pictures() -> dict[str, bytes]:
    """Pictures of many kinds, by odd names."""
    photo = Image.fromarray(pixels(60, 80))
    deep = Image.fromarray(pixels(60, 80, 1)[..., 0].astype(np.uint16) * 257)
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE)
    frames = [Image.fromarray(pixels(40, 40, seed=seed)) for seed in (1, 2)]
    return {
        "a b.png": encoded(photo),
        "Grüße.jpg": encoded(photo, "JPEG"),
        "🦊.webp": encoded(photo, "WEBP"),
        "-dash.bmp": encoded(photo, "BMP"),
        "no ending": encoded(photo, "TIFF"),
        "palette.png": encoded(palette, transparency=3),
        "turned.jpg": upside_down(photo),
        "deep.png": encoded(deep),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "alpha.png": encoded(pixels(60, 80, 4)),
        "one pixel.png": encoded(pixels(1, 1)),
        "wide.png": encoded(pixels(20, 300)),
    }


@torch.inference_mode()
def probabilities(clip, classes, templates, image: Image.Image) -> np.ndarray:
    """What a tower says of a picture, by the pair's own transform."""
    similar = clip.encode_image(clip.transform()(image)[None]) @ clip.zero_shot_head(classes, templates).T
    return (clip.logit_scale.exp() * similar).softmax(-1)[0].numpy()


def test_pictures_of_any_kind_are_answered_as_by_the_tower(answering, bare, tmp_path):
    made = pictures()
    paths = [write(tmp_path / name, content) for name, content in made.items()]
    found = rows(bare("--check", answering.onnx, "--image", *paths))
    assert [row["image"] for row in found] == list(map(str, paths))
    seen = set()
    for row, content in zip(found, made.values()):
        expected = probabilities(answering.clip, answering.classes, answering.made["templates"], decode_viewer(content))
        said = [dict(row["probabilities"])[name] for name in answering.classes]
        np.testing.assert_allclose(said, expected, atol=2e-5)
        assert row["class"] == answering.classes[expected.argmax()] == row["probabilities"][0][0]
        seen.add(tuple(said))
    assert len(seen) > 8  # so that the numbers are of the pictures


def test_people_read_percentages(answering, bare, tmp_path):
    path = write(tmp_path / "x.png", encoded())
    done = bare("--image", path, "--check", answering.onnx)
    (row,) = rows(done)
    (best, share), *_ = row["probabilities"]
    assert row["class"] == best and done.stderr.startswith(f"{path}: {best} {100 * share:.1f} %, ")


@pytest.mark.parametrize(
    "content, told",
    [(b"", "the file is empty"), (b"GIF", "in no image format"), (encoded()[:-60], "cannot be decoded")],
)
def test_broken_pictures_are_one_line(content, told, answering, bare, tmp_path):
    check_refused(bare("--check", answering.onnx, "--image", write(tmp_path / "x.png", content)), told)


def test_good_pictures_are_answered_beside_a_bad_one(answering, bare, tmp_path):
    good = [write(tmp_path / name, encoded(pixels(seed=seed))) for seed, name in enumerate(("a.png", "b.png"))]
    bad = write(tmp_path / "bad.png", b"GIF")
    done = bare("--check", answering.onnx, "--imag", good[0], bad, good[1])  # as argparse takes flags
    assert done.returncode == 2
    assert [json.loads(line)["image"] for line in done.stdout.splitlines()] == [str(path) for path in good]
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told.startswith(f"error: image {bad}: cannot be decoded") and "no image format" in told


def check_refused(done, told):
    assert done.returncode == 2 and done.stdout == "" and told in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr


def test_what_is_not_there_or_needs_torch_is_one_line(answering, bare, tmp_path):
    picture = write(tmp_path / "x.png", encoded())
    check_refused(bare("--check", answering.onnx, "--image", tmp_path / "none.png"), "none.png: cannot be read")
    check_refused(bare("--check", answering.onnx, "--image", tmp_path), f"{tmp_path}: cannot be read (Is a directory)")
    check_refused(bare("--check", tmp_path / "none.onnx", "--image", picture), "none.onnx: there is no such file")
    check_refused(bare("--keep-rate", "0.6", "--out", tmp_path / "y.onnx"), "torch is not installed here; without it")
    check_refused(
        bare("--check", answering.onnx, answering.int8, "--ima", picture), "--image asks one file, but --check"
    )
    check_refused(bare("--check", answering.onnx), "torch is not installed here; without it try --check FILE.onnx")


def test_a_program_needs_torch(answering, bare, tmp_path):
    with zipfile.ZipFile(tmp_path / "toy.pt2", "w") as archive:
        archive.writestr("toy/extra/patchrank.json", json.dumps(open_file(answering.onnx)[1] | {"format": "pt2"}))
    picture = write(tmp_path / "x.png", encoded())
    told = "a .pt2 file needs torch, which is not installed here; try ONNX"
    check_refused(bare("--check", tmp_path / "toy.pt2", "--image", picture), told)


def test_a_file_without_classes_has_no_answer(bare, answering, tmp_path):
    with open(answering.onnx, "rb") as file:
        content = file.read()
    names = json.dumps(list(answering.classes))[1:-1].encode()
    assert content.count(b'"classes": [' + names) == 1
    path = write(tmp_path / "x.onnx", content.replace(names, b" " * len(names)))  # as long, or it is no ONNX
    done = bare("--check", path, "--image", write(tmp_path / "x.png", encoded()))
    check_refused(done, "holds no classes to answer with; try --classes")


def test_a_file_that_names_another_number_of_classes_has_no_answer(answering, tmp_path):
    picture = str(write(tmp_path / "x.png", encoded()))
    path = with_classes(answering, tmp_path, [*answering.classes, "bear"])
    told = f"^{path}: names 4 classes, but gives 3 probabilities; try to export anew$"
    with pytest.raises(UserError, match=told):
        print_answers(["--check", path, "--image", picture])


def test_classes_of_one_name_keep_their_probabilities(answering, tmp_path, capsys):
    picture = str(write(tmp_path / "x.png", encoded()))
    for names in (answering.classes, ["cat", "cat", "dog"]):
        print_answers(["--check", with_classes(answering, tmp_path, names), "--image", picture])
    usual, alike = (json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines())
    assert sorted(name for name, _ in alike) == ["cat", "cat", "dog"]
    assert [share for _, share in alike] == [share for _, share in usual]


def with_classes(answering, folder: Path, names) -> str:
    return with_metadata(answering, folder, lambda about: about.update(classes=list(names)))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The embedded pair at keep rate 0.6, and its files in both formats."""
    folder = tmp_path_factory.mktemp("digits")
    clip = create_clip("patchrank_clip_digits", keep_rate=0.6)
    for ending in ("onnx", "pt2"):
        export_tower(clip, folder / f"digits.{ending}", scenes.CLASSES, scenes.TEMPLATES)
    return clip, folder


def answers_of(path: str, clip, split, batch_size: int = 60) -> np.ndarray:
    run, _ = open_file(path)
    batches = split.batches(clip.transform(), batch_size)
    return np.concatenate([run(images.numpy()).argmax(1) for images, _ in batches])


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_all_validation_images_are_classed_as_evaluate_does(digits, ending):
    clip, folder = digits
    split = load_split("digits", "val")
    expected = evaluate(clip, split, quiet=True).answers["pruned"]
    path = str(folder / f"digits.{ending}")
    found = answers_of(path, clip, split)
    others, row = int((found != expected).sum()), compare(CheckedFile(path), clip, split, 60, quiet=True)
    print(f"{ending}: {others} of {len(split)} images have another class; {row['near_ties']} have other patches")
    assert len(split) == 1080 and row["passed"] and row["contradictions"] == 0
    assert others <= row["near_ties"] <= 5  # 0 where this was written


@pytest.mark.slow
def test_in_an_environment_of_three_packages_a_file_answers_as_evaluate_does(tmp_path):
    """The two commands as the page prints them; the second where torch was never installed."""
    python = new_environment(tmp_path / "venv")
    path, env = tmp_path / "digits.onnx", os.environ | {"PYTHONPATH": str(ROOT)}
    asked = ["--model", "patchrank_clip_digits", "--keep-rate", "0.6"]
    made = ["-m", "patchrank.export", *asked, "--classes", *scenes.CLASSES, "--out", str(path)]
    subprocess.run([sys.executable, *made], check=True, env=env, capture_output=True)
    split = replace(load_split("digits", "val", 40), templates=("a photo of a {}.",))  # as files are made by default
    pictures = [write(tmp_path / f"{i}.png", encoded(split.image(i))) for i in range(len(split))]
    command = [python, "-m", "patchrank.export", "--check", str(path), "--image", *map(str, pictures)]
    found = rows(subprocess.run(command, env=env, capture_output=True, text=True))
    clip = create_clip("patchrank_clip_digits", keep_rate=0.6)
    expected = evaluate(clip, split, quiet=True).answers["pruned"]
    assert [row["class"] for row in found] == [split.classes[place] for place in expected]
    assert len({row["class"] for row in found}) > 5


def new_environment(folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    missing = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    subprocess.run([python, "-c", missing], check=True)
    return python
