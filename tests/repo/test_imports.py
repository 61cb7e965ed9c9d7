"""`import patchrank` is light, and the stages that a GPU machine runs import without Ray."""

import inspect
import subprocess
import sys

import pytest

import patchrank
from patchrank.models.clip import create_clip

HEAVY = ("ray", "webdataset", "open_clip", "matplotlib", "optuna", "sklearn", "transformers")


STAGES = ("golden", "fit", "evaluate", "benchmark", "prompt.tuning", "trial.run", "report", "visualize")
STAGES += ("export.command",)


@pytest.fixture(scope="module")
def loaded():
    """Heavy modules that are there after an import, by what was imported: all in one Python, one after the other."""
    modules = ["patchrank", *(f"patchrank.{stage}" for stage in STAGES), "webdataset"]
    code = f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module(name)\n"
    code += f"    print(name, *(heavy for heavy in {HEAVY} if heavy in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name: set(heavy) for name, *heavy in map(str.split, done.stdout.splitlines())}


def test_import_patchrank_is_light(loaded):
    assert loaded["patchrank"] == set()


def test_the_tests_here_can_fail(loaded):
    assert "webdataset" in loaded["webdataset"]


@pytest.mark.parametrize("stage", STAGES)
def test_stages_need_neither_ray_nor_open_clip_to_import(stage, loaded):
    assert loaded[f"patchrank.{stage}"] & {"ray", "optuna", "open_clip", "webdataset", "transformers"} == set()


def test_public_names_come_with_their_own_signatures_and_docstrings():
    assert {
        "create_clip",
        "find_tower",
        "preset",
        "prune",
        "prune_open_clip",
        "save_pretrained",
        "unprune",
        "UserError",
    } == set(patchrank.__all__)
    assert set(patchrank.__all__) <= set(dir(patchrank))
    assert patchrank.create_clip is create_clip and "checkpoint" in inspect.signature(patchrank.create_clip).parameters
    assert all(inspect.getdoc(getattr(patchrank, name)) for name in patchrank.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'creat_clip'"):
        patchrank.creat_clip  # noqa: B018


def test_scoring_from_tensors_runs_where_ray_webdataset_and_open_clip_are_missing():
    code = """
import sys
for name in ("ray", "optuna", "webdataset", "open_clip"):
    sys.modules[name] = None
import timm, torch, patchrank
from patchrank.golden import score_images
tower = timm.create_model("patchrank_clip_digits", pretrained=True, keep_rate=0.6).eval()
images = torch.randn(2, 3, 64, 64)
print(score_images(tower, images, torch.eye(10, 64)).scores.shape, tower(images).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[2, 2, 64]" in done.stdout
