"""How many sequences run at a time: as many as a budget of memory has room for."""

from __future__ import annotations

import torch
from torch import nn

from patchrank.golden.suffix import embed, shares_qkv
from patchrank.layers.shared_qkv import qkv_of
from patchrank.utils.device import full_precision

# Of a CPU: bytes of the widest activations, those inside an MLP of four times the tower's width. More do not fit its
# caches; but matrix products want some hundred rows, so at least four sequences run. docs/method.md has the figures.
CPU_BYTES = 3 * 2**19
CPU_LEAST = 4

# Of a GPU: the share of its memory that a batch may fill, whatever else lies there, so that one kind of GPU gives one
# number; and the most sequences that were ever run. Neither was measured.
GPU_SHARE = 0.25
MOST = 392
TRIED = 8  # sequences whose memory is measured
_MEASURED: dict[tuple, int] = {}  # bytes that these took, by what they depend on


def batch_size_of(tower: nn.Module, layer: int, window: int) -> int:
    """How many sequences run at a time where nobody says: by their length on a CPU, by their memory on a GPU.

    Args:
        layer: the layer, from 1, before which windows leave.
        window: their side, in tokens.
    """
    device, length = tower.pos_embed.device, tower.num_leading_tokens + tower.num_patches - window**2
    if device.type == "cpu":
        return max(CPU_LEAST, CPU_BYTES // (length * 4 * tower.embed_dim * 4))
    if device.type == "cuda":
        kind = device, tower.pos_embed.dtype, tower.embed_dim, len(tower.blocks) - layer, length
        if kind not in _MEASURED:  # once a process: scoring asks for each of its calls
            _MEASURED[kind] = memory_of(tower, layer, TRIED, length)
        _, total = torch.cuda.mem_get_info(device)
        return max(1, min(MOST, int(GPU_SHARE * total * TRIED / _MEASURED[kind])))
    return MOST


@torch.inference_mode()
def memory_of(tower: nn.Module, layer: int, batch_size: int, length: int) -> int:
    """Bytes of GPU memory that so many sequences of a length take, from a layer on, at their peak."""
    device = tower.pos_embed.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    x = torch.zeros(batch_size, length, tower.embed_dim, device=device, dtype=tower.pos_embed.dtype)
    with full_precision():
        embed(tower, layer, x, qkv_of(tower.blocks[layer - 1], x) if shares_qkv(tower, layer) else None)
    return torch.cuda.max_memory_allocated(device) - before
