"""Content ids: sha256 of plain values, and of a model's weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from patchrank.utils.errors import UserError


def content_id(value: object) -> str:
    """sha256 of a value's canonical JSON; it names results that depend on that value alone."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def weights_sha256(
    model: nn.Module,
    without: tuple[str, ...] = (),
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """sha256 over names, types, shapes and bytes of a model's tensors.

    Activations and the norms' epsilon count as well, if they are not CLIP's usual ones (GELU and 1e-5): weights do not
    show them.

    Args:
        without: beginnings of names that do not count.
        weights: what the model is about to load, in place of the tensors that it has.
        dtype: hashes floating-point tensors as if they were of this type.

    Raises:
        UserError: a weight that `is_plain_tensor` does not find plain.
    """
    settings = set()
    for name, module in model.named_modules():
        if not name.startswith(without):
            if name.endswith((".act", ".gelu")):
                settings.add(f"{type(module).__name__} {getattr(module, 'approximate', 'none')}\n")
            if isinstance(module, nn.LayerNorm):
                settings.add(f"eps {module.eps}\n")
    unusual = sorted(settings - {"GELU none\n", "eps 1e-05\n"})
    digest = hashlib.sha256("".join(unusual).encode())
    for key, value in sorted((model.state_dict() if weights is None else weights).items()):
        if not key.startswith(without):
            if not is_plain_tensor(value):
                raise UserError(
                    f"weight {key} is quantised, or otherwise no plain tensor, so that nothing can be said of where it "
                    "comes from; try the same before it is quantised"
                )
            value = value.detach().cpu().contiguous()
            value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_plain_tensor(value: object) -> bool:
    """Whether an entry of a state dict has bytes of its own; quantised layers and tensors on `meta` have none."""
    return type(value) in (Tensor, nn.Parameter) and not (value.is_quantized or value.is_meta)
