"""What fitting and matching read from golden-rank shards: tokens of every image, beside their golden scores."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from patchrank.golden.shards import read_manifest, stream
from patchrank.layers.pooling import summary
from patchrank.layers.schedule import check_locations
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError, near
from patchrank.utils.progress import progress

BATCH_SIZE = 64  # images that run at a time


class Ranked(NamedTuple):
    """What fitting and matching read from shards: cls (n, D), patches (n, N, D), golden importance (n, N)."""

    cls: Tensor
    patches: Tensor
    golden: Tensor


@torch.no_grad()  # and not inference mode, whose tensors would have to be copied before anything can be fitted to them
def read_ranked(clip: Clip, path: str, metric: str, location: int, quiet: bool = False) -> Ranked:
    """Tokens as they enter `location` and golden scores by `metric`, for every image of a folder of shards.

    Holds all of it in memory: N * D * 4 bytes an image (16 KiB on the embedded default, 588 KiB on B/16).

    Raises:
        UserError: shards of another model, grid or metric, damaged ones, or more images than memory has room for.
    """
    manifest = read_manifest(path)
    _check_manifest(clip, manifest, path)
    if metric not in manifest["metrics"]:
        raise UserError(f"metric {metric!r} is not in shards {path}; {near(metric, manifest['metrics'])}")
    row = manifest["metrics"].index(metric)
    (location,) = check_locations((location,), len(clip.visual.blocks))
    transform, device = clip.transform(), clip.logit_scale.device
    golden, batch, count = [], [], manifest["data"]["count"]
    shape = count, clip.visual.num_patches + clip.visual.num_leading_tokens, clip.visual.embed_dim
    _check_memory(shape, device, path)
    x = torch.empty(shape, device=device)
    samples = islice(stream(path), count + 1)  # one too many is enough to tell
    for n, sample in enumerate(progress(samples, total=count, desc="read shards", unit="image", disable=quiet), 1):
        batch.append(transform(sample.image()))
        golden.append(torch.from_numpy(sample.scores[row]))
        if len(batch) == BATCH_SIZE or n == count:
            x[n - len(batch) : n] = clip.visual.forward_prefix(torch.stack(batch).to(device), location)
            batch = []
    if len(golden) != count:
        raise UserError(f"shards {path}: {len(golden)} samples were read, but the manifest promises {count}")
    first = clip.visual.num_leading_tokens
    return Ranked(summary(x, first, clip.visual.has_class_token), x[:, first:], torch.stack(golden).to(device))


def _check_memory(shape: tuple[int, int, int], device: torch.device, path: str) -> None:
    """Refuses tokens that would fill more than half of the memory, before hours are spent on them."""
    wanted = 4 * math.prod(shape)
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > there / 2:
        raise UserError(
            f"shards {path}: the tokens of {shape[0]:,} images take {wanted / 2**30:.0f} GiB, and half of the memory "
            f"is {there / 2**31:.0f} GiB: fit to fewer images (--limit of golden, data.n_train)"
        )


def _check_manifest(clip: Clip, manifest: dict, path: str) -> None:
    """Raises `UserError` for shards of another model, other prompts, another transform or another grid."""
    model, grid = manifest["model"], list(clip.visual.patch_embed.grid_size)
    theirs, ours = (about.get("prompts", "none")[:12] for about in (model, clip.prompts_about()))
    if model["sha256"] != (own := clip.sha256()):
        says = f"were computed from {model['name']} with weights {model['sha256'][:12]}"
        side = manifest["transform"]["input_size"][-1]
        cure = "" if manifest["grid"] == grid else f"; their images have {side} pixels a side, so try --img-size {side}"
        raise UserError(f"shards {path} {says}, but this model is {clip.name} with {own[:12]}{cure}")
    if theirs != ours:
        raise UserError(f"shards {path} were computed with prompts {theirs}, but this model has prompts {ours}")
    if manifest["transform"] != (seen := clip.transform_settings()):
        raise UserError(f"shards {path} hold images as {manifest['transform']}, but {clip.name} sees {seen}")
    if manifest["grid"] != grid:
        raise UserError(f"shards {path} are of grid {manifest['grid']}, not {grid}")


def pooled(parts: Sequence[Ranked]) -> Ranked:
    """Images of several tasks as one set."""
    return parts[0] if len(parts) == 1 else Ranked(*(torch.cat(columns) for columns in zip(*parts)))
