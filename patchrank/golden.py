"""Phase I: golden scores. What happens to the embedding when a window of tokens is removed? (section 3.1)

    python -m patchrank.golden --data digits --split adapt --limit 256 --out runs/shards

One pass over the windows gives all three metrics; blocks before the removal are run once an image. Damage is
computed in float64 as 1 - s, in forms that do not round to 1 where the paper's s saturates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from patchrank.cli import add_data_flags, add_model_flags, create_clip_from, run_command
from patchrank.data.shards import SHARD_SIZE, Sample, ShardFolder
from patchrank.data.tasks import ImageSplit, decode_image, load_split
from patchrank.errors import UserError
from patchrank.files import resolve
from patchrank.layers import pruning
from patchrank.models.clip import Clip

METRICS = ("label", "confidence", "preservation")
VERSION = 1  # of the scoring: bump it when the same images would get other scores
BATCH_SIZE = 392  # sequences, that is pairs of an image and a window


class GoldenScores(NamedTuple):
    """scores (B, M, N): importance g, high = keep; windows (B, M, W): raw damage per window; M metrics, float64."""

    scores: Tensor
    windows: Tensor


@torch.inference_mode()
def score_images(
    tower: nn.Module,
    images: Tensor,
    head: Tensor,
    labels: Tensor | None = None,
    logit_scale: float = 100.0,
    window: int = 2,
    stride: int = 1,
    remove_at: int = 4,
    batch_size: int = BATCH_SIZE,
) -> GoldenScores:
    """Golden scores of images by label (eq. 1), confidence (eq. 2) and preservation (eq. 3).

    Args:
        tower: image tower with `forward_prefix` and `forward_suffix`, in evaluation mode.
        images: (B, 3, H, W), normalised.
        head: class embeddings (C, E), unit vectors.
        labels: (B,) ground truth; without them there is no `label` row (M = 2).
        window, stride: side of the removed square and its step, in tokens.
        remove_at: layer, counted from 1, before which the window's tokens leave.
        batch_size: sequences run at a time.

    Raises:
        UserError: a window larger than the grid, tokens that no window covers, a layer outside the tower.
    """
    (remove_at,) = pruning.check_locations((remove_at,), len(tower.blocks))
    squares = pruning.windows(tower.patch_embed.grid_size, window, stride)
    with full_precision():
        tokens = tower.forward_prefix(images, remove_at)
        whole = F.normalize(tower.forward_suffix(tokens, remove_at).double(), dim=-1)
        pieces = F.normalize(_without_windows(tower, tokens, squares, remove_at, batch_size).double(), dim=-1)
    damage = torch.stack(_damages(whole, pieces, head.double(), labels, float(logit_scale)), dim=1)  # (B, M, W)
    per_token = pruning.window_mean(damage, squares, tower.num_patches)
    return GoldenScores(pruning.importance(per_token), damage)


def _without_windows(tower: nn.Module, tokens: Tensor, squares: Tensor, layer: int, batch_size: int) -> Tensor:
    """Embeddings (B, W, E) of every image without every window."""
    prefix = tower.num_prefix_tokens
    rest = pruning.outside(squares, tower.num_patches) + prefix
    keep = torch.cat([torch.arange(prefix).expand(len(rest), -1), rest], dim=1).to(tokens.device)  # (W, P + N - r * r)
    pairs = torch.cartesian_prod(torch.arange(len(tokens)), torch.arange(len(squares))).to(tokens.device)
    embeddings = [
        tower.forward_suffix(pruning.take(tokens[image], keep[square]), layer)
        for image, square in (chunk.unbind(1) for chunk in pairs.split(batch_size))
    ]
    return torch.cat(embeddings).unflatten(0, (len(tokens), len(squares)))


def _damages(whole: Tensor, pieces: Tensor, head: Tensor, labels: Tensor | None, scale: float) -> list[Tensor]:
    """Damage (B, W) by each metric, from unit embeddings of full (B, E) and pruned (B, W, E) sequences."""
    logits = scale * pieces @ head.T  # (B, W, C)
    damages = [] if labels is None else [_improbability(logits, labels[:, None].expand(logits.shape[:2]))]
    damages.append(_improbability(logits, logits.argmax(-1)))
    damages.append((whole[:, None] - pieces).square().sum(-1) / 2)  # 1 - cos of unit vectors
    return damages


def _improbability(logits: Tensor, classes: Tensor) -> Tensor:
    """1 - softmax(logits)[class], as the share of all other classes, so that it keeps its digits near 0."""
    others = logits.scatter(-1, classes.unsqueeze(-1), -torch.inf)
    return (others.logsumexp(-1) - logits.logsumexp(-1)).exp()


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 without TF32, as published scores want it; a no-op on CPUs."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def shard_folder(
    clip: Clip, split: ImageSplit, root: str, window: int, stride: int, remove_at: int, rounds: int = 1
) -> ShardFolder:
    """The folder that holds, or will hold, these scores; its name depends on all that they depend on."""
    if rounds != 1:
        raise UserError(f"golden.rounds must be 1 in this version, but is {rounds}")
    pruning.check_locations((remove_at,), len(clip.visual.blocks))
    pruning.windows(clip.visual.patch_embed.grid_size, window, stride)
    header = {
        "schema": 1,
        "version": VERSION,
        "metrics": list(METRICS),
        "grid": list(clip.visual.patch_embed.grid_size),
        "golden": {"window": window, "stride": stride, "remove_at": remove_at, "rounds": rounds},
        "model": {"name": clip.name, "sha256": clip.sha256()},
        "data": {
            "task": split.task,
            "split": split.split,
            "ids_sha256": split.ids_sha256(),
            "count": len(split),
            "classes": list(split.classes),
            "templates": list(split.templates),
        },
        "transform": clip.transform_settings(),
        "shard_size": SHARD_SIZE,
    }
    return ShardFolder(root, header)


def score_shard(clip: Clip, split: ImageSplit, folder: ShardFolder, index: int, batch_size: int = BATCH_SIZE) -> None:
    """Scores and writes one shard. Batches never cross shards, so that stopping anywhere changes no byte."""
    first = index * SHARD_SIZE
    places = range(first, first + folder.sizes[index])
    transform, device = clip.transform(), clip.logit_scale.device
    contents = [split.read(i) for i in places]
    images = torch.stack([transform(decode_image(content)) for content in contents]).to(device)
    head = clip.zero_shot_head(split.classes, split.templates)
    settings = {key: folder.header["golden"][key] for key in ("window", "stride", "remove_at")}
    labels = torch.tensor([split.labels[i] for i in places], device=device)
    golden = score_images(
        clip.visual, images, head, labels, clip.logit_scale.exp().item(), batch_size=batch_size, **settings
    )
    scores, damage = (part.float().cpu().numpy() for part in golden)
    samples = (
        Sample(split.ids[i], contents[n], split.extension, split.labels[i], scores[n], damage[n])
        for n, i in enumerate(places)
    )
    folder.write(index, samples)


def make_shards(
    clip: Clip, split: ImageSplit, folder: ShardFolder, batch_size: int = BATCH_SIZE, quiet: bool = False
) -> str:
    """Makes what is missing or damaged of a folder, names it, and returns the folder's path."""
    faults = folder.faults()
    report_faults(folder, faults)
    for index in tqdm(sorted(faults), desc=f"golden {split.task}/{split.split}", unit="shard", disable=quiet):
        score_shard(clip, split, folder, index, batch_size)
    if faults or not folder.complete():
        folder.finish(batch=batch_size, threads=torch.get_num_threads())
    return folder.path


def report_faults(folder: ShardFolder, faults: dict[int, str]) -> None:
    """One line on stderr for each shard that was there and is not sound."""
    for index, fault in faults.items():
        if fault != "not made yet":
            tqdm.write(f"shard {folder.path}/shard-{index:06d}.tar is {fault}; making it again", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m patchrank.golden", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_flags(parser, out="runs/shards")
    add_data_flags(parser, split="adapt", batch_size=BATCH_SIZE)
    parser.add_argument("--window", type=int, default=2, help="side of the removed square, in tokens")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--remove-at", type=int, default=4, help="layer, from 1, before which the window leaves")
    args = parser.parse_args(argv)
    clip, split = create_clip_from(args), load_split(args.data, args.split, args.limit, args.data_root)
    folder = shard_folder(clip, split, resolve(args.out), args.window, args.stride, args.remove_at)
    print(make_shards(clip, split, folder, args.batch_size))


if __name__ == "__main__":
    run_command(main)
