"""The one counter of arithmetic: multiply-accumulates (MACs) from shapes alone; FLOPs are twice as many.

Counted: convolutions, linear layers and the two products of attention. Not counted, as is usual: norms, softmax,
activations, gathers. Tested against torch's `FlopCounterMode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import nn


@dataclass(frozen=True)
class Macs:
    """MACs of one image."""

    vision: int
    predictor: int = 0  # ranking, by whatever reducer
    matching: int = 0  # similarity search of merging reducers

    @property
    def image(self) -> int:
        """All that one image costs once class embeddings are cached."""
        return self.vision + self.predictor + self.matching


def block_macs(num_tokens: int, dim: int, hidden: int, cls_only: bool = False, leave_mid: int = 0) -> int:
    """One transformer block; with `cls_only`, keys and values of all tokens but everything else for one.

    Args:
        leave_mid: how many tokens leave between attention and MLP.
    """
    rows = 1 if cls_only else num_tokens
    projections = 2 * num_tokens * dim * dim + 2 * rows * dim * dim  # k, v; q, out
    attention = 2 * rows * num_tokens * dim
    return projections + attention + 2 * (1 if cls_only else rows - leave_mid) * dim * hidden


def hidden_size(block: nn.Module) -> int:
    """Width of the MLP of a block, also where its first layer is wrapped in others (LoRA)."""
    return max(
        part.out_features
        for name, part in block.named_modules()
        if "fc1" in name.split(".") and hasattr(part, "out_features")
    )


def vision_macs(
    model: nn.Module,
    locations: Sequence[int] = (),
    drop_counts: Sequence[int] = (),
    cls_only_last: bool = False,
    num_leading: int | None = None,
    mid: bool = False,
) -> int:
    """An image tower of ours that loses `drop_counts` patch tokens just before layers `locations`.

    Visual prompts count as tokens; making them of text tokens is done once for all images, and is not counted. Nor is
    what others hang on a layer beside its own weights (LoRA).

    Args:
        num_leading: tokens before the patches; `model.num_leading_tokens`, prompts among them, if left out.
        mid: tokens leave in the middle of those layers instead, between attention and MLP.
    """
    dim, depth = model.embed_dim, len(model.blocks)
    hidden = hidden_size(model.blocks[0])
    patches = model.patch_embed.num_patches
    drops = dict(zip(locations, drop_counts))
    total = patches * model.in_chans * prod(model.patch_embed.patch_size) * dim
    alive = patches + (model.num_leading_tokens if num_leading is None else num_leading)
    for layer in range(1, depth + 1):
        leaving, cls_only = drops.get(layer, 0), cls_only_last and layer == depth
        alive -= 0 if mid else leaving
        total += block_macs(alive, dim, hidden, cls_only, leaving if mid else 0)
        alive -= leaving if mid else 0
    return total + dim * model.num_classes


def text_macs(width: int, layers: int, output_dim: int, context_length: int = 77, mlp_ratio: float = 4.0) -> int:
    """CLIP's text tower for one caption."""
    return layers * block_macs(context_length, width, int(width * mlp_ratio)) + width * output_dim
