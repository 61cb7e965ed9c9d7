"""Towers of two layers, and files of them that are made in half a second."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from torch import nn

from patchrank.export import program_file
from patchrank.export.description import describe
from patchrank.export.program import ExportedTower, trace
from patchrank.models.clip import Clip

SHAPE = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "locations": (2,), "keep_rate": 0.5}


def create_tower(reducer="cls_attention", **settings):
    """The same weights for the same shape; 16 patches, of which 8 leave."""
    torch.manual_seed(0)
    shape = SHAPE | {"reducer": reducer, "predictor_init": "random"} | settings
    tower = timm.create_model("patchrank_clip_digits", **shape).eval()
    for name, parameter in tower.named_parameters():
        if name.endswith("qkv.weight"):
            nn.init.normal_(parameter, std=0.3)  # sharp attention, so that rankings have no ties
    return tower


def pair_of(tower):
    return Clip("tiny", tower, nn.Identity()).eval()


def images_of(tower, count=4):
    return torch.randn(count, 3, *tower.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def write_pt2(path: Path, clip: Clip, uint8: bool = False, **changes: object) -> str:
    """A file of a pair's image tower; changes of its metadata."""
    module = ExportedTower(clip, uint8=uint8).eval()
    about = describe(clip, module, "pt2") | changes
    path.write_bytes(program_file.save(trace(module, False), json.dumps(about)))
    return str(path)


def changed(path: str, to: Path, changes: Mapping[str, Callable[[bytes], bytes | None]], **added: bytes) -> str:
    """A copy of an archive with some of its parts changed, or left out where a change gives None, and others added.

    Args:
        changes: by the part's name below the archive's folder.
    """
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(to, "w") as copy:
        assert changes.keys() <= {name.partition("/")[2] for name in archive.namelist()}
        for name in archive.namelist():
            content = changes.get(name.partition("/")[2], bytes)(archive.read(name))
            if content is not None:
                copy.writestr(name, content)
        for name, content in added.items():
            copy.writestr(name, content)
    return str(to)
