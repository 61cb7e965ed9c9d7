"""Towers of two layers, and files of them that are made in half a second."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from patchrank.export import program_file
from patchrank.export.description import describe
from patchrank.export.program import ClassHead, ExportedTower, trace
from patchrank.layers.predictors import create_predictor, save_predictor
from patchrank.layers.prompts import Prompts
from patchrank.layers.repair import Repair
from patchrank.models.clip import Clip, create_clip
from patchrank.models.prompt_files import describe as describe_prompts
from patchrank.models.prompt_files import save_prompts
from patchrank.models.repair_files import describe_repair, save_repair

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


def write_pt2(path: Path, clip: Clip, head: ClassHead | None = None, uint8: bool = False, **changes: object) -> str:
    """A file of a pair's image tower; changes of its metadata."""
    module = ExportedTower(clip, head, uint8).eval()
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


NAME, SETTINGS = "patchrank_clip_digits", {"keep_rate": 0.6, "locations": (2, 3), "drop_share": 0.25, "img_size": 48}


def write_files(folder: Path, seed: int = 0) -> dict[str, str]:
    """A file of each kind that weights come from, random and fitting to each other, by the flag that names it."""
    paths = {flag: str(folder / f"{flag}.safetensors") for flag in ("checkpoint", "predictor", "repair", "prompts")}
    torch.manual_seed(seed)
    clip = create_clip(NAME, False)
    for parameter in clip.parameters():  # norms too
        nn.init.normal_(parameter, parameter.mean().item(), 0.05)
    save_file(clip.state_dict(), paths["checkpoint"])
    clip = create_clip(NAME, checkpoint=paths["checkpoint"], **SETTINGS, predictor_init="random")
    tower = clip.visual
    about = {"name": "mix_mlp", "kwargs": {}, "grid": [6, 6], "embed_dim": 64, "location": 2, "metric": "preservation"}
    about["model"] = {"name": NAME, "sha256": tower.blocks_sha256()}
    save_predictor(create_predictor("mix_mlp", 64, (6, 6)), paths["predictor"], about)
    tower.set_pruning(predictor_path=paths["predictor"])
    repair = Repair(torch.randn(tower.head.weight.shape), torch.randn(len(tower.head.weight)))
    repair.about = describe_repair(tower, NAME) | {"images": 60, "ridge": 0.1, "data": []}
    save_repair(repair, paths["repair"])
    save_prompts(Prompts("TV", 2, 64, 64, seed=seed), paths["prompts"], describe_prompts(clip))
    return paths


def flags(**given: str) -> argparse.Namespace:
    """What a command was given of files."""
    return argparse.Namespace(
        **{"seed": 0, "checkpoint": None, "predictor": None, "repair": None, "prompts": None} | given
    )
