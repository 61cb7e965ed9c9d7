"""A random open_clip model of toy size as two files: its config and its weights."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write_config(path: Path, **changes: object) -> str:
    """Writes the config, with changes of its keys; returns what `--model` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(CONFIG | changes, indent=1))
    return f"open_clip:{path}"


def create_theirs(folder: Path, name: str = "toy", **changes: object) -> torch.nn.Module:
    """open_clip's own model, by its own factory, in evaluation mode; the same weights for the same shape."""
    write_config(folder / f"{name}.json", **changes)
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_model(folder: Path, **changes: object) -> tuple[str, str]:
    """What `--model` and `--checkpoint` take: the toy's files in a folder."""
    model = create_theirs(folder, **changes)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "toy.safetensors")
    return f"open_clip:{folder / 'toy.json'}", str(folder / "toy.safetensors")
