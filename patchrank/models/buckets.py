"""A keep rate for each image: one tower with a few static schedules, and each image takes that of its bucket.

Shapes: n images, b of a batch, N patches, P tokens before those, D width, R keep rates, E width of embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchrank.config import MIN_REPAIR_IMAGES
from patchrank.models.clip import Clip
from patchrank.models.embed import over_batches, split_batches, unit
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.utils.compiling import raise_graph_limit
from patchrank.utils.errors import UserError

PARTS = {2: 200, 3: 100, 4: 40}  # number of keep rates -> of how many parts of the images buckets may be made
RIDGES = np.logspace(0, 4, 9).tolist()  # that are tried
SMALLEST = 1e-6  # drift below it is rounding, so logarithms begin here


class Rest(nn.Module):
    """What a tower runs from its first location on, which has static shapes and so may be compiled."""

    def __init__(self, tower: PrunedVisionTransformer):
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (b, E) of images (b, 3, H, W) whose tokens (b, P + N, D) enter the tower's shared layer."""
        return self.tower.forward_pruned(images, tokens=tokens, mapped=False).embedding


class BucketedTower(nn.Module):
    """A tower that gives each image one of a few keep rates, by how far pruning is likely to move its embedding.

    All images of a batch run together up to the first location. A linear map of their class token and mean patch there
    predicts how difficult each one is, and limits on that number sort the images into buckets. Every bucket runs the
    rest of the tower by a static schedule of its own, and embeddings come back in the order of the images. An image's
    bucket does not depend on the others. All schedules share the weights of `tower`, which stays as it is.

    Args:
        tower: its locations, taper, reducer and leftovers go for every bucket.
        keep_rates: R of them, from 2 to 4, rising: difficult images keep more.
        difficulty: 2 D channels to one number, high = difficult.
        limits: R - 1 numbers, rising; an image on a limit belongs above it.
        compile: compile the rest of the tower to one graph for each bucket. An empty bucket is not run. This raises
            torch's limit on compiled forms of one function for the whole process.

    Raises:
        UserError: keep rates or limits that are none, a tower in which nothing leaves, one with a repair, or a reducer
            that cannot rank by itself.
    """

    def __init__(
        self,
        tower: PrunedVisionTransformer,
        keep_rates: Sequence[float],
        difficulty: nn.Linear,
        limits: Sequence[float],
        compile: bool = False,
    ):
        super().__init__()
        self.keep_rates = tuple(keep_rates)
        self.rests = nn.ModuleList([Rest(each) for each in towers_at(tower, self.keep_rates)])
        limits = torch.as_tensor(limits, dtype=torch.float32)
        if limits.shape != (len(keep_rates) - 1,) or (limits.diff() < 0).any():
            raise UserError(
                f"limits must be {len(keep_rates) - 1} rising numbers for {len(keep_rates)} keep rates, but are "
                f"{limits.tolist()}; try fit_buckets, which chooses them"
            )
        self.difficulty = difficulty.to(tower.pos_embed.device, torch.float32).requires_grad_(False)
        self.register_buffer("limits", limits.to(tower.pos_embed.device))
        if compile:
            raise_graph_limit()  # all buckets run the same functions, each with shapes of its own
            for rest in self.rests:
                rest.compile(fullgraph=True)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (b, E) of images (b, 3, H, W), normalised as the tower gets them."""
        return self.forward_bucketed(images)[0]

    def forward_bucketed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (b, E), and the bucket (b,) of each image: its place among `keep_rates`."""
        tower = self.rests[0].tower
        tokens = tower.forward_prefix(images, tower.shared_layer)
        buckets = torch.bucketize(self.difficulty(summary(tower, tokens)).squeeze(-1), self.limits, right=True)
        order = buckets.argsort(stable=True)
        counts = torch.bincount(buckets, minlength=len(self.rests)).tolist()
        parts = zip(self.rests, images[order].split(counts), tokens[order].split(counts))
        sorted_by_bucket = torch.cat([rest(some, theirs) for rest, some, theirs in parts if len(some)])
        return torch.empty_like(sorted_by_bucket).index_copy(0, order, sorted_by_bucket), buckets

    def macs(self, shares: Sequence[float]) -> float:
        """Mean multiply-accumulates of an image where so large a share of all images is in each bucket."""
        costs = sum(share * rest.tower.macs().image for share, rest in zip(shares, self.rests))
        return float(costs) + self.difficulty.in_features


def towers_at(tower: PrunedVisionTransformer, keep_rates: Sequence[float]) -> list[PrunedVisionTransformer]:
    """Towers that share all weights of one and have keep rates of their own. Raises `UserError` as `BucketedTower`."""
    if len(keep_rates) not in PARTS or any(low >= high for low, high in zip(keep_rates, keep_rates[1:])):
        raise UserError(
            f"buckets need 2 to 4 different keep rates, rising, but got {tuple(keep_rates)}; try 0.4 0.6 0.8"
        )
    if tower.pruner is None:
        raise UserError("buckets need a tower from which patches leave; try keep_rate 0.6")
    if tower.pruning.reducer == "golden":
        raise UserError("buckets need a reducer that ranks by itself, but 'golden' is an oracle; try predictor")
    if tower.repair is not None:
        raise UserError("a repair belongs to one schedule, and buckets have several; try it without (repair_path=None)")
    shared = {id(tensor): tensor for tensor in (*tower.parameters(), *tower.buffers())}
    towers = [copy.deepcopy(tower, dict(shared)) for _ in keep_rates]
    for each, rate in zip(towers, keep_rates):
        each.set_pruning(keep_rate=rate, drop_counts=None, budget=None)
        if each.pruner is None:
            raise UserError(f"a bucket's keep rate must let a patch leave, but {rate} lets none; try 0.9")
    return towers


def summary(tower: PrunedVisionTransformer, tokens: Tensor) -> Tensor:
    """What difficulty is read from: the class token and the mean patch of tokens (b, P + N, D), as (b, 2 D)."""
    return torch.cat([tokens[:, 0], tokens[:, tower.num_leading_tokens :].mean(1)], dim=-1).float()


def fit_buckets(
    clip: Clip, splits: Sequence[Any], keep_rates: Sequence[float], compile: bool = False, quiet: bool = False
) -> BucketedTower:
    """Buckets with the mean multiply-accumulates of the pruning in force, from images whose labels are not read.

    Difficulty is a ridge regression of the logarithm of drift (1 - cosine to the whole tower's embedding, mean over the
    keep rates). Limits are chosen for the least mean drift, by what is told of each image if it is left out.

    Args:
        clip: its pruning says how large the mean may be; it stays as it is.
        splits: images of one or more tasks, at least 50 in all, like those that will come.
        keep_rates: as of `BucketedTower`, in any order.

    Raises:
        UserError: as `BucketedTower`, too few images, or keep rates that all cost more than the pruning in force.
    """
    if (count := sum(map(len, splits))) < MIN_REPAIR_IMAGES:
        raise UserError(f"buckets need at least {MIN_REPAIR_IMAGES} images to be made from, but got {count}")
    keep_rates = sorted(set(keep_rates))
    towers = towers_at(clip.visual, keep_rates)
    costs = [tower.macs().image + 2 * tower.embed_dim for tower in towers]
    most = clip.visual.macs().image
    if costs[0] > most or costs[-1] < most:
        raise UserError(
            f"keep rates {keep_rates} cost {costs[0] / 1e9:.4g} to {costs[-1] / 1e9:.4g} GMACs an image, but must lie "
            f"on both sides of the pruning in force, which costs {most / 1e9:.4g}"
        )
    summaries, drift = _measured(clip, splits, towers, quiet)
    difficulty, predicted = fit_difficulty(summaries, np.log(drift.clip(SMALLEST)).mean(1))
    limits = choose_limits(predicted, drift, costs, most)
    return BucketedTower(clip.visual, keep_rates, difficulty, limits, compile)


def _measured(
    clip: Clip, splits: Sequence[Any], towers: Sequence[PrunedVisionTransformer], quiet: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Summaries (n, 2 D) of all images, and their drift (n, R) in each of R towers."""

    def one_batch(images: Tensor, _: range) -> tuple[Tensor, Tensor]:
        tokens = towers[0].forward_prefix(images, towers[0].shared_layer)
        whole = unit(towers[0].forward_whole(images, tokens))
        pruned = [unit(tower.forward_pruned(images, tokens=tokens).embedding) for tower in towers]
        drift = torch.stack([(whole - each).square().sum(-1) / 2 for each in pruned], dim=-1)
        return summary(towers[0], tokens).cpu(), drift.cpu()

    parts = [
        part for split in splits for part in over_batches(clip, split_batches(clip, split, quiet=quiet), one_batch)
    ]
    summaries, drift = (torch.cat([part[side] for part in parts]).numpy() for side in (0, 1))
    return summaries, drift


def fit_difficulty(summaries: np.ndarray, targets: np.ndarray) -> tuple[nn.Linear, np.ndarray]:
    """A linear map from summaries (n, F) to targets (n,), and what it would tell of each image (n,) if fitted without.

    Ridge regression of standardised summaries, with the ridge of least squared error on images that are left out one
    by one. With H = U diag(s^2 / (s^2 + ridge)) U^T of the singular values s, leaving image i out makes its error
    (y_i - (H y)_i) / (1 - H_ii), so that nothing is fitted twice.
    """
    x, y = summaries.astype(float), targets - targets.mean()
    mean, scale = x.mean(0), x.std(0).clip(SMALLEST)
    u, s, vt = np.linalg.svd((x - mean) / scale, full_matrices=False)
    left_out = {}
    for ridge in RIDGES:
        share = s**2 / (s**2 + ridge)
        left_out[ridge] = (y - u @ (share * (u.T @ y))) / (1 - 1 / len(y) - u**2 @ share)
    best = min(RIDGES, key=lambda ridge: np.square(left_out[ridge]).sum())
    weight = vt.T @ (s / (s**2 + best) * (u.T @ y)) / scale
    linear = nn.Linear(len(weight), 1)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight[None]))
        linear.bias.fill_(targets.mean() - mean @ weight)
    return linear, targets - left_out[best]


def choose_limits(difficulty: np.ndarray, drift: np.ndarray, costs: Sequence[float], most: float) -> np.ndarray:
    """Limits (R - 1,) between buckets of least mean drift whose mean cost is at most `most`.

    Images in the order of their difficulty are cut into equal parts (`PARTS`), and every way to give rising keep rates
    to parts is looked at.

    Args:
        difficulty: (n,).
        drift: (n, R), at rising keep rates.
        costs: (R,), what an image costs at each, rising and not all above `most`.
    """
    order, (count, rates) = np.argsort(difficulty, kind="stable"), drift.shape
    steps = np.round(np.linspace(0, count, PARTS[rates] + 1)).astype(int)
    inner = steps[np.array(list(combinations_with_replacement(range(len(steps)), rates - 1)))]
    ends = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, count)))  # (ways, R + 1): buckets' ends
    total = np.pad(drift[order].cumsum(0), ((1, 0), (0, 0)))
    drifts = sum(total[ends[:, rate + 1], rate] - total[ends[:, rate], rate] for rate in range(rates))
    within = np.diff(ends) @ np.asarray(costs, float) <= most * count * (1 + 1e-12)
    best = ends[np.where(within, drifts, np.inf).argmin(), 1:-1]
    around = np.concatenate([[-np.inf], difficulty[order], [np.inf]])
    return (around[best] + around[best + 1]) / 2
