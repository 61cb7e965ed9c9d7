"""Random towers of toy size, exported; and what a file gives beside what its tower gives."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import timm
import torch
from helpers.open_clip_files import write_model
from torch import Tensor

from patchrank.export import __main__ as started
from patchrank.export.check import CheckedFile
from patchrank.export.command import main
from patchrank.export.write import export_tower
from patchrank.layers.predictors import create_predictor, save_predictor
from patchrank.layers.reducers import REDUCERS
from patchrank.models.clip import Clip, create_clip
from patchrank.utils.command import run_command


def create_tower(reducer="center", depth=2, locations=(1,), **settings):
    """16 patches, of which half leave at each location."""
    torch.manual_seed(0)
    shape = {"depth": depth, "embed_dim": 16, "num_heads": 2, "img_size": 32, "locations": locations, "keep_rate": 0.5}
    if REDUCERS[reducer].fitted:
        shape["predictor_init"] = "random"
    return timm.create_model("patchrank_clip_digits", reducer=reducer, **shape | settings).eval()


def export(folder: Path, reducer="center", ending="onnx", **settings):
    """A tower, and the path of its file."""
    tower, path = create_tower(reducer, **settings), folder / f"toy.{ending}"
    export_tower(tower, path)
    return tower, str(path)


def images_of(batch: int, side: int = 32) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


@torch.inference_mode()
def check_equal(tower, path: str, batches=(1, 2, 5)) -> None:
    """Whether a file chooses what its tower chooses, and gives its embeddings, at several sizes of batches."""
    file = CheckedFile(path)
    for batch in batches:
        images = images_of(batch)
        found, expected = file.run(images)[0], tower.forward_pruned(images, mapped=False)
        assert found["kept"].shape == (batch, tower.num_patches - sum(tower.pruner.drops.values()))
        assert torch.equal(found["kept"].sort(1).values, expected.kept.sort(1).values)
        unit = torch.nn.functional.normalize(expected.embedding, dim=-1)
        torch.testing.assert_close(found["embedding"], unit, atol=1e-5, rtol=0)


class Answering(NamedTuple):
    """A pair of toy size that names classes, and its files.

    Attributes:
        flags: that name the pair, its predictor and its pruning.
        made: what the command printed when it exported.
        told: what it told people.
    """

    clip: Clip
    classes: tuple[str, ...]
    onnx: str
    int8: str
    flags: tuple[str, ...]
    made: dict
    told: str


CLASSES, TEMPLATES = ("a bird", "cat", "dog"), ("a photo of a {}.", "{}, seen from above")


def export_answering(folder: Path) -> Answering:
    """Exports by the command, as a user does."""
    model, checkpoint = write_model(folder)
    clip = create_clip(model, checkpoint=checkpoint)
    predictor, onnx, int8 = (str(folder / name) for name in ("p.safetensors", "toy.onnx", "toy.int8.onnx"))
    about = {"name": "mix_mlp", "kwargs": {}, "grid": [4, 4], "embed_dim": 64, "location": 1, "metric": "preservation"}
    about["model"] = {"name": clip.name, "sha256": clip.visual.blocks_sha256()}
    torch.manual_seed(0)
    save_predictor(create_predictor("mix_mlp", 64, (4, 4)), predictor, about)
    flags = ("--model", model, "--checkpoint", checkpoint, "--predictor", predictor)
    pruning = ("--keep-rate", "0.5", "--locations", "1")
    head = ("--classes", *CLASSES, "--templates", *TEMPLATES)
    printed, told = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(told):
        assert main([*flags, *pruning, *head, "--out", onnx, "--int8", int8]) == 0
    clip = create_clip(model, checkpoint=checkpoint, predictor_path=predictor, keep_rate=0.5, locations=(1,))
    return Answering(clip, CLASSES, onnx, int8, flags, json.loads(printed.getvalue()), told.getvalue())


def damaged(answering: Answering, folder: Path, change: Callable[[onnx.ModelProto], None]) -> str:
    """The file, with a change of its model."""
    model = onnx.load(answering.onnx)
    change(model)
    onnx.save(model, folder / "toy.onnx")
    return str(folder / "toy.onnx")


def with_metadata(answering: Answering, folder: Path, change: Callable[[dict], None]) -> str:
    """The file, with a change of what it says of itself."""

    def say(model):
        about = json.loads(model.metadata_props[0].value)
        change(about)
        model.metadata_props[0].value = json.dumps(about)

    return damaged(answering, folder, say)


def ended(flags: Sequence[object], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """The exit status of a command, and what it said on stderr."""
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: started.main(list(map(str, flags))))
    return caught.value.code, capsys.readouterr().err


def refused(flags: Sequence[object], capsys: pytest.CaptureFixture) -> str:
    """The one line that a command ends with."""
    code, told = ended(flags, capsys)
    assert code == 2 and told.startswith("error: ") and len(told.splitlines()) == 1, told
    return told
