"""Names for what a value or a model's weights determine."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn


def content_id(value: object) -> str:
    """sha256 of a JSON value's canonical form; the name of whatever that value determines."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unusual(model: nn.Module, without: tuple[str, ...]) -> list[str]:
    """Kinds of activation and of epsilon, other than the usual ones, that a model has."""
    found = set()
    for name, module in model.named_modules():
        if not name.startswith(without or ("\0",)):
            if name.endswith((".act", ".gelu")):
                found.add(f"{type(module).__name__} {getattr(module, 'approximate', 'none')}\n")
            if isinstance(module, nn.LayerNorm):
                found.add(f"eps {module.eps}\n")
    return sorted(found - {"GELU none\n", "eps 1e-05\n"})


def weights_sha256(model: nn.Module, without: tuple[str, ...] = ()) -> str:
    """sha256 over names, types, shapes and bytes of a model's tensors, but for names that start with `without`.

    What weights do not show counts as well, where it is not CLIP's plain GELU and 1e-5: activations and norms' epsilon.
    """
    digest = hashlib.sha256("".join(_unusual(model, without)).encode())
    for key, value in sorted(model.state_dict().items()):
        if not key.startswith(without):
            value = value.detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes())
    return digest.hexdigest()
