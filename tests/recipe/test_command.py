"""The recipe once through, on a small SigLIP and a small DINOv2 from their configs, and a folder of photographs."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import toy_hosts
from PIL import Image
from sklearn.datasets import load_sample_images

import patchrank
from patchrank.models.clip import create_clip
from patchrank.recipe import command
from patchrank.trial.run import run_trial
from patchrank.utils.errors import UserError

NAMES = ["Urlaub (1).JPG", "ünïcödé {photo}.png", "IMG_0001 copy.jpeg", "$x_{2}$.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Crops of two photographs, of odd sizes and names, without labels."""
    folder = tmp_path_factory.mktemp("photos")
    draw, sources = np.random.default_rng(0), load_sample_images().images
    for n in range(110):
        (height, width), source = draw.integers(40, 120, 2), sources[n % 2]
        top, left = draw.integers(0, source.shape[0] - height), draw.integers(0, source.shape[1] - width)
        name = NAMES[n] if n < len(NAMES) else f"{n:03d}.png"
        Image.fromarray(source[top : top + height, left : left + width]).save(folder / name)
    return str(folder)


def siglip(folder):
    pytest.importorskip("transformers")
    model = toy_hosts.create("SiglipVisionModel")
    model.save_pretrained(folder)
    return model, f"hf:{folder}"


def dinov2(folder):
    pytest.importorskip("transformers")
    model = toy_hosts.create("Dinov2Model")
    model.save_pretrained(folder)
    return model, f"hf:{folder}"


def run(name, photos, folder, *flags):
    """What the command prints on stdout, in a folder of its own."""
    flags = ["--model", name, "--data", "folder", "--data-root", photos, "--out", f"{folder}/out", *flags]
    command.main([*flags, "--work", f"{folder}/work", "--batch-size", "2"])


def drift(model, clip, split_images):
    images = torch.stack([clip.transform()(image) for image in split_images])
    with torch.no_grad():
        whole = clip.visual(images)
        return float((1 - F.cosine_similarity(toy_hosts.embedding(model, images), whole, dim=-1)).mean())


@pytest.mark.parametrize("create", [siglip, dinov2])
def test_once_through(create, photos, tmp_path, capsys, monkeypatch):
    model, name = create(tmp_path / "model")
    run(name, photos, tmp_path, "--budget", "0.6", "--img-size", "32")
    first = json.loads(capsys.readouterr().out)
    assert first["figures"]["gmacs"] <= 0.6 * first["figures"]["gmacs_unpruned"]
