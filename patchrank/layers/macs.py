"""The one counter of arithmetic: multiply-accumulates (MACs) from shapes alone; FLOPs are twice as many.

Counted: convolutions, linear layers, the two products of attention, and the products by which tokens are compared and
merged. Not counted, as is usual: norms, softmax, activations, gathers. Tested against torch's `FlopCounterMode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from patchrank.layers.merging import num_merging
from patchrank.layers.pooling import pool_macs
from patchrank.utils.errors import UserError


@dataclass(frozen=True)
class Macs:
    """MACs of one image."""

    vision: int
    predictor: int = 0  # scoring tokens, by whatever reducer
    matching: int = 0  # comparing tokens, and adding up those that merge

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
    """Width of the MLP of a block, also where its first layer is wrapped in others (LoRA).

    Of a gated one (SwiGLU) that of a plain MLP of the same cost.
    """
    widths = {"fc1": [0], "fc2": [0]}
    for name, part in block.named_modules():
        for layer, side in (("fc1", "out_features"), ("fc2", "in_features")):
            if layer in name.split(".") and hasattr(part, side):
                widths[layer].append(getattr(part, side))
    first, second = (max(found) for found in widths.values())
    if first and first == second:
        return first
    linear = [part for part in getattr(block, "mlp", block).modules() if isinstance(part, nn.Linear)]
    return sum(part.in_features * part.out_features for part in linear) // (2 * linear[0].in_features)


def check_costs(blocks: nn.Module) -> None:
    """Raises `UserError` for blocks whose MACs are not known, since they have no part that is called `mlp`."""
    for block in blocks.children():
        if not any(isinstance(part, nn.Linear) for part in getattr(block, "mlp", nn.Identity()).modules()):
            raise UserError(f"layers of kind {type(block).__name__} have no mlp, so their cost is not known; try a ViT")


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
    return (
        total
        + pool_macs(model, alive - (model.num_leading_tokens if num_leading is None else num_leading))
        + dim * model.num_classes
    )


def merging_macs(
    tower: nn.Module,
    leaving: Mapping[int, tuple[int, int]],
    metric: str | None,
    mid: bool = True,
    num_pairs: Callable[[int], int] | None = None,
    drop_share: float = 0.0,
) -> int:
    """MACs of one image for comparing tokens, and for `merging.joined` on tokens, their weights and their sizes.

    Args:
        leaving: for each location how many patch tokens there are, and how many of them leave.
        metric: what is compared: `keys`, or tokens of the tower's width for anything else.
        mid: tokens leave inside of the layers that locations name, instead of before them.
        num_pairs: how many pairs of so many tokens are compared; if left out, each token that merges is compared with
            each that stays.
        drop_share: share of what leaves that is dropped instead.
    """
    compared = tower.embed_dim
    if metric == "keys":  # asked of a layer whose keys are read, since others may have attention without keys
        compared = tower.blocks[max(min(leaving, default=1) - (not mid), 1) - 1].attn.head_dim
    total = 0
    for alive, count in leaving.values():
        met = num_merging(count, drop_share) * (alive - count)
        total += (met if num_pairs is None else num_pairs(alive)) * compared + met * (tower.embed_dim + 2)
    return total


def text_macs(width: int, layers: int, output_dim: int, context_length: int = 77, mlp_ratio: float = 4.0) -> int:
    """CLIP's text tower for one caption."""
    return layers * block_macs(context_length, width, int(width * mlp_ratio)) + width * output_dim
