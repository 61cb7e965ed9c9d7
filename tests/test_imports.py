"""`import patchrank` is light, and the stages that a GPU machine runs import without Ray."""

import subprocess
import sys

import pytest

HEAVY = ("ray", "webdataset", "open_clip", "matplotlib", "optuna", "sklearn")


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(n for n in {HEAVY} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_patchrank_is_light():
    assert loaded_by("import patchrank") == set()


def test_the_test_above_can_fail():
    assert loaded_by("import patchrank, webdataset") == {"webdataset"}


@pytest.mark.parametrize("stage", ["golden", "fit", "evaluate", "benchmark", "trial", "chosen", "report", "visualize"])
def test_stages_need_neither_ray_nor_open_clip_to_import(stage):
    assert loaded_by(f"import patchrank.{stage}") & {"ray", "optuna", "open_clip", "webdataset"} == set()


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
