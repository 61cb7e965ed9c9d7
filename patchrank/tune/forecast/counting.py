"""Arithmetic of golden scores, and bytes of shards and records, before there are any."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import ImageOps
from torch import nn

from patchrank.data.image_split import ImageSplit
from patchrank.layers.class_token import is_plain
from patchrank.layers.macs import block_macs, vision_macs
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.run import PICTURES

BLOCK, TAR_END = 512, 1024 + 10240 // 2  # bytes that tars are made of, and what is behind the last member
JSON = 2500  # bytes of a record without its arrays


def score_macs(tower: nn.Module, squares: int, window: int, remove_at: int, rounds: int) -> int:
    """Of one image's golden scores: once whole, and once without each window; at most, where there are more rounds."""
    patches, prefix = tower.num_patches, tower.num_leading_tokens
    total = vision_macs(tower, cls_only_last=is_plain(tower.blocks[-1]))
    for n in range(rounds):
        alive = patches - n * (patches // rounds)
        length = prefix + round(alive * (1 - window**2 / patches))  # a window has lost as many as the rest
        total += squares * suffix_macs(tower, length, remove_at)
    return total


def suffix_macs(tower: nn.Module, length: int, layer: int) -> int:
    """Of a sequence of so many tokens from `layer` (1 to depth) to its embedding."""
    depth, hidden = len(tower.blocks), tower.blocks[0].mlp.fc1.out_features
    last = is_plain(tower.blocks[-1])
    blocks = (block_macs(length, tower.embed_dim, hidden, last and n == depth) for n in range(layer, depth + 1))
    return sum(blocks) + tower.embed_dim * tower.num_classes


def prefix_macs(tower: nn.Module, layer: int) -> int:
    """Of a whole image up to what enters `layer`."""
    length = tower.num_patches + tower.num_leading_tokens
    return vision_macs(tower, cls_only_last=is_plain(tower.blocks[-1])) - suffix_macs(tower, length, layer)


def sample_bytes(split: ImageSplit, arrays: Sequence[int], few: int = 8) -> int:
    """Of one image in a shard: its own bytes, label, id, and arrays of so many bytes, each a member of a tar."""
    contents = [len(split.content(n)) for n in range(min(few, len(split)))]
    members = [sum(contents) / len(contents), 40, *(128 + size for size in arrays)]
    members += [] if split.labels is None else [2]
    return sum(BLOCK + -(-int(size) // BLOCK) * BLOCK for size in members)


def record_bytes(trial: ResolvedTrial, inputs: Inputs) -> int:
    """Of a trial's record and its arrays: names and cosines of all images, and pictures of the first."""
    side, draw, total = inputs.clip.visual.pretrained_cfg["input_size"][-1], np.random.default_rng(0), JSON
    for task in trial.config.data.tasks:
        for part in ("val", "test"):
            split, arrays = inputs.split(task, part), {}
            shown = range(min(len(split), max(1, PICTURES // len(trial.config.data.tasks))) if part == "test" else 0)
            arrays["pictures"] = np.asarray([np.asarray(ImageOps.fit(split.image(n), (side, side))) for n in shown])
            arrays |= {"ids": np.asarray(split.ids), "groups": np.asarray(split.clusters())}
            arrays |= {"cosine": draw.random(len(split), np.float32)}
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)
            total += buffer.tell()
    return total
