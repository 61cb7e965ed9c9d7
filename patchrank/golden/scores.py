"""Phase I: golden scores. What happens to the embedding when a window of tokens is removed? (section 3.1)

    python -m patchrank.golden --data digits --split adapt --limit 256 --out runs/shards

One pass over the windows gives all three metrics; blocks before the removal are run once an image. Damage is
computed in float64 as 1 - s, in forms that do not round to 1 where the paper's s saturates. `--rounds` asks again
once the least important tokens have left: the greedy search of the paper's abstract.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.cli.flags import (
    add_data_flags,
    add_model_flags,
    create_clip_from,
    load_split_from,
    positive,
    run_command,
)
from patchrank.data.dataset_factory import find_task
from patchrank.data.image_split import ImageSplit
from patchrank.golden.shards import SHARD_SIZE, Sample, ShardFolder
from patchrank.io import content_id, resolve
from patchrank.layers import pruning
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError, near
from patchrank.utils.progress import progress, write_line

METRICS = ("label", "confidence", "preservation")
VERSION = 1  # of the scoring: bump it when the same images would get other scores
# Sequences, that is pairs of an image and a window, run at a time. A CPU wants no more than its caches hold: on the
# embedded tower 98 take 0.7 of the time that 392 take, with the same scores to the last bit. Larger towers, and GPUs,
# were not measured.
BATCH_SIZES = {"cpu": 98, "cuda": 392}


class GoldenScores(NamedTuple):
    """scores (B, M, N): importance g, high = keep; windows (B, M, W): raw damage per window; M metrics, float64."""

    scores: Tensor
    windows: Tensor


@torch.inference_mode()
def score_images(
    tower: nn.Module,
    images: Tensor,
    head: Tensor | None = None,
    labels: Tensor | None = None,
    logit_scale: float = 100.0,
    window: int = 2,
    stride: int = 1,
    remove_at: int = 4,
    rounds: int = 1,
    metrics: Sequence[str] = METRICS,
    batch_size: int | None = None,
) -> GoldenScores:
    """Golden scores of images by label (eq. 1), confidence (eq. 2) and preservation (eq. 3).

    Args:
        tower: image tower with `forward_prefix` and `forward_suffix`, in evaluation mode.
        images: (B, 3, H, W), normalised.
        head: class embeddings (C, E), unit vectors; without them there is `preservation` alone.
        labels: (B,) ground truth; without them there is no `label` row.
        window, stride: side of the removed square and its step, in tokens.
        remove_at: layer, counted from 1, before which the window's tokens leave.
        rounds: 1 scores every token of the whole image. With R rounds the N // R least important tokens leave after
            each of them, and the rest is scored again against the same whole image; g is then the z-scored rank.
        metrics: rows wanted; those that cannot be had are left out. Rounds cost one search for each, since different
            tokens leave.
        batch_size: sequences run at a time; `batch_size_of` the images' device if left out.

    Raises:
        UserError: a window larger than the grid, tokens that no window covers, a layer outside the tower, more rounds
            than tokens, an unknown metric, or none that can be had without labels or class names.
    """
    (remove_at,) = pruning.check_locations((remove_at,), len(tower.blocks))
    squares = pruning.windows(tower.patch_embed.grid_size, window, stride).to(images.device)
    check_rounds(rounds, tower.num_patches)
    wanted = _known_metrics(metrics, labels is not None, head is not None)
    batch_size = batch_size or batch_size_of(images.device.type)
    with full_precision():
        tokens = tower.forward_prefix(images, remove_at)
        whole = F.normalize(tower.forward_suffix(tokens, remove_at).double(), dim=-1)

        def damage(alive: Tensor) -> Tensor:  # (B, N) to (B, M, W)
            pieces = _without_windows(tower, tokens, squares, alive, remove_at, batch_size)
            pieces = F.normalize(pieces.double(), dim=-1)
            return torch.stack(_damages(wanted, whole, pieces, head, labels, float(logit_scale)), dim=1)

        everything = tokens.new_ones(len(tokens), tower.num_patches, dtype=torch.bool)
        first = damage(everything)
        if rounds == 1:
            return GoldenScores(pruning.importance(pruning.window_mean(first, squares, tower.num_patches)), first)
        ranks = [
            _greedy(lambda alive, m=m: damage(alive)[:, m], first[:, m], squares, everything, rounds)
            for m in range(len(wanted))
        ]
    return GoldenScores(pruning.importance(torch.stack(ranks, dim=1)), first)


def batch_size_of(device: str) -> int:
    """How many sequences run at a time on a kind of device (`cpu`, `cuda`, ...) where nobody says."""
    return BATCH_SIZES["cpu" if device == "cpu" else "cuda"]


def _known_metrics(metrics: Sequence[str], labelled: bool, named: bool) -> list[str]:
    """Those of `metrics` that can be had: all of them where classes have names and images have labels."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"metric {name!r} does not exist; {near(name, METRICS)}")
    had = {"label": named and labelled, "confidence": named, "preservation": True}
    wanted = [name for name in metrics if had[name]]
    if not wanted:
        what = "labels" if named else "class names"
        raise UserError(f"metrics {list(metrics)} need {what}, and there are none; near: preservation")
    return wanted


def check_rounds(rounds: int, num_tokens: int) -> None:
    if not 1 <= rounds <= num_tokens:
        raise UserError(f"rounds must lie in 1..{num_tokens}, the number of tokens, but is {rounds}")


def _greedy(damage: Callable[[Tensor], Tensor], first: Tensor, squares: Tensor, alive: Tensor, rounds: int) -> Tensor:
    """Ranks (B, N), high = left last: after each round the least important tokens leave, and the rest is scored again.

    damage(alive) gives the damage (B, W) of windows among the tokens still there; `first` is that of the first round.
    """
    num_tokens, alive = alive.shape[1], alive.clone()
    ranks = first.new_zeros(alive.shape)
    values = torch.arange(num_tokens - 1, -1, -1, device=first.device, dtype=first.dtype).expand_as(ranks)
    for n in range(rounds):
        per_token = pruning.window_mean(first if n == 0 else damage(alive), squares, num_tokens)
        order = pruning.rank(per_token.masked_fill(~alive, -torch.inf))  # the dead stand at the end
        here = num_tokens - n * (num_tokens // rounds)
        leaving = slice(here - num_tokens // rounds if n < rounds - 1 else 0, here)
        ranks.scatter_(1, order[:, leaving], values[:, leaving])
        alive.scatter_(1, order[:, leaving], False)
    return ranks


def _without_windows(
    tower: nn.Module, tokens: Tensor, squares: Tensor, alive: Tensor, layer: int, batch_size: int
) -> Tensor:
    """Embeddings (B, W, E) of what is alive (B, N) of every image without every window; 0 where a window is empty.

    Sequences of one length run together: windows that have partly left already remove fewer tokens.
    """
    member = torch.zeros(len(squares), tower.num_patches, dtype=torch.bool, device=squares.device)
    member.scatter_(1, squares, True)
    rest, touched = alive[:, None] & ~member, (alive[:, None] & member).any(-1)  # (B, W, N), (B, W)
    lengths = torch.where(touched, rest.sum(-1), -1)
    out = tokens.new_zeros(*lengths.shape, tower.num_classes or tower.embed_dim)
    for length in lengths.unique().tolist():
        if length >= 0:
            pairs = (lengths == length).nonzero()
            for image, square in (chunk.unbind(1) for chunk in pairs.split(batch_size)):
                patches = rest[image, square].nonzero()[:, 1].view(len(image), length) + tower.num_leading_tokens
                leading = torch.arange(tower.num_leading_tokens, device=patches.device).expand(len(image), -1)
                kept = pruning.take(tokens[image], torch.cat([leading, patches], dim=1))
                out[image, square] = tower.forward_suffix(kept, layer)
    return out


def _damages(
    metrics: Sequence[str],
    whole: Tensor,
    pieces: Tensor,
    head: Tensor | None,
    labels: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Damage (B, W) by each metric, from unit embeddings of full (B, E) and pruned (B, W, E) sequences."""
    logits = None if head is None else scale * pieces @ head.double().T  # (B, W, C)
    ways = {
        "label": lambda: _improbability(logits, labels[:, None].expand(logits.shape[:2])),
        "confidence": lambda: _improbability(logits, logits.argmax(-1)),
        "preservation": lambda: (whole[:, None] - pieces).square().sum(-1) / 2,  # 1 - cos of unit vectors
    }
    return [ways[name]() for name in metrics]


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
    clip: Clip,
    split: ImageSplit,
    root: str,
    window: int,
    stride: int,
    remove_at: int,
    rounds: int = 1,
    metric: str = "preservation",
    sha256: str | None = None,
) -> ShardFolder:
    """The folder that holds, or will hold, these scores; its name depends on all that they depend on.

    One round scores all metrics at once; more rounds are a search for each, and made for `metric` alone.
    `sha256` is the pair's fingerprint, for callers that know it.
    """
    check_rounds(rounds, clip.visual.num_patches)
    pruning.check_locations((remove_at,), len(clip.visual.blocks))
    pruning.windows(clip.visual.patch_embed.grid_size, window, stride)
    header = {
        "schema": 1,
        "version": VERSION,
        "metrics": _known_metrics(METRICS if rounds == 1 else [metric], split.labels is not None, bool(split.classes)),
        "grid": list(clip.visual.patch_embed.grid_size),
        "golden": {"window": window, "stride": stride, "remove_at": remove_at, "rounds": rounds},
        "model": {"name": clip.name, "sha256": sha256 or clip.sha256()} | clip.prompts_about(),
        "data": {
            "task": split.task,
            "split": split.split,
            "ids_sha256": split.ids_sha256(),
            "decoding": split.decoding,
            "count": len(split),
            "labels_sha256": content_id(split.labels),
            "classes": list(split.classes),
            "templates": list(split.templates),
        },
        "transform": clip.transform_settings(),
        "shard_size": SHARD_SIZE,
    }
    return ShardFolder(root, header)


def score_shard(clip: Clip, split: ImageSplit, folder: ShardFolder, index: int, batch_size: int | None = None) -> None:
    """Scores and writes one shard. Batches never cross shards, so that stopping anywhere changes no byte."""
    first = index * SHARD_SIZE
    places = range(first, first + folder.sizes[index])
    transform, device = clip.transform(), clip.logit_scale.device
    contents = [split.content(i) for i in places]
    images = torch.stack([transform(split.decode(i, content)) for i, content in zip(places, contents)]).to(device)
    head = clip.zero_shot_head(split.classes, split.templates) if split.classes else None
    settings = folder.header["golden"] | {"metrics": folder.header["metrics"]}
    labels = None if split.labels is None else torch.tensor([split.label(i) for i in places], device=device)
    golden = score_images(
        clip.visual, images, head, labels, clip.logit_scale.exp().item(), batch_size=batch_size, **settings
    )
    scores, damage = (part.float().cpu().numpy() for part in golden)
    samples = (
        Sample(split.ids[i], contents[n], split.label(i), scores[n], damage[n], split.decoding)
        for n, i in enumerate(places)
    )
    folder.write(index, samples)


def make_shards(
    clip: Clip, split: ImageSplit, folder: ShardFolder, batch_size: int | None = None, quiet: bool = False
) -> str:
    """Makes what is missing or damaged of a folder, names it, and returns the folder's path."""
    faults, batch_size = folder.faults(), batch_size or batch_size_of(clip.logit_scale.device.type)
    report_faults(folder, faults)
    what = f"golden {split.task}/{split.split}"
    for index in progress(sorted(faults), desc=what, unit="shard", delay=0, disable=quiet or not faults):
        score_shard(clip, split, folder, index, batch_size)
    if faults or not folder.complete():
        folder.finish(batch=batch_size, threads=torch.get_num_threads())
    return folder.path


def report_faults(folder: ShardFolder, faults: dict[int, str]) -> None:
    """One line on stderr for each shard that was there and is not sound."""
    for index, fault in faults.items():
        if fault != "not made yet":
            write_line(f"shard {folder.path}/shard-{index:06d}.tar is {fault}; making it again")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m patchrank.golden", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_flags(parser, out="runs/shards")
    add_data_flags(parser, "the task's training images", batch_size=None)
    parser.add_argument("--window", type=int, default=2, help="side of the removed square, in tokens")
    parser.add_argument("--stride", type=int, default=1, help="tokens from one square to the next")
    parser.add_argument("--remove-at", type=int, default=4, help="layer, from 1, before which the window leaves")
    parser.add_argument("--rounds", type=positive, default=1, help="how often the rest is scored again")
    parser.add_argument("--metric", default="preservation", choices=METRICS, help="which one, with more than 1 round")
    args = parser.parse_args(argv)
    task = find_task(args.data)
    clip = create_clip_from(args)
    split = load_split_from(args, task.training)
    settings = {key: getattr(args, key) for key in ("window", "stride", "remove_at", "rounds", "metric")}
    folder = shard_folder(clip, split, resolve(args.out), **settings)
    print(make_shards(clip, split, folder, args.batch_size))


if __name__ == "__main__":
    run_command(main)
