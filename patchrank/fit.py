"""Phase II: fits a predictor to the golden ranking (section 3.2) by streaming golden-rank shards.

TRAIN=$(python -m patchrank.golden --data digits --split adapt --limit 256 --out runs/shards)
VAL=$(python -m patchrank.golden --data digits --split val --limit 128 --out runs/shards)
python -m patchrank.fit --shards $TRAIN --val-shards $VAL --location 4 --out runs/predictor.safetensors
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.cli.flags import add_model_flags, create_clip_from, positive, positive_float, run_command
from patchrank.cli.summary import MATCHING, percentages, print_row
from patchrank.config import TrialConfig
from patchrank.golden.scores import METRICS
from patchrank.golden.shards import read_manifest, stream
from patchrank.layers.predictors import Prior, check_location, create_predictor, save_predictor
from patchrank.layers.pruning import check_locations
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError, near
from patchrank.utils.metrics import kendall, matching_each, matching_rate, ndcg, position_prior, top_k
from patchrank.utils.progress import progress

VERSION = 1  # of the fitting: bump it when the same shards would give another predictor
BATCH_SIZE = 64
LAST_LR_SHARE = 0.1  # the cosine ends at this share of the first rate
WEIGHT_DECAY = 1e-4

# scores, golden importance (B, N) -> a number
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # two-sided binary cross-entropy with soft targets; the paper's eq. 8 lacks the second side
    "bce": lambda scores, golden: F.binary_cross_entropy_with_logits(scores, golden.sigmoid()),
    # ListNet: which token comes first, as a distribution over an image's tokens
    "listwise": lambda scores, golden: -(golden.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean(),
    # the paper's own, to the letter
    "eq8": lambda scores, golden: -(golden.sigmoid() * F.logsigmoid(scores)).mean(),
}
WARNINGS = {"eq8": "loss eq8 is one-sided, as the paper prints it: high scores for all tokens minimise it; near: bce"}


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
    row = _check_manifest(clip, manifest, path, metric)
    check_locations((location,), len(clip.visual.blocks))
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
    return Ranked(x[:, 0], x[:, clip.visual.num_leading_tokens :], torch.stack(golden).to(device))


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


def _check_manifest(clip: Clip, manifest: dict, path: str, metric: str) -> int:
    own = clip.sha256()
    if manifest["model"]["sha256"] != own:
        raise UserError(
            f"shards {path} were computed from {manifest['model']['name']} with weights "
            f"{manifest['model']['sha256'][:12]}, but this model is {clip.name} with {own[:12]}"
        )
    theirs, ours = (about.get("prompts", "none")[:12] for about in (manifest["model"], clip.prompts_about()))
    if theirs != ours:
        raise UserError(f"shards {path} were computed with prompts {theirs}, but this model has prompts {ours}")
    if manifest["transform"] != clip.transform_settings():
        raise UserError(
            f"shards {path} hold images as {manifest['transform']}, but {clip.name} sees {clip.transform_settings()}"
        )
    if manifest["grid"] != list(clip.visual.patch_embed.grid_size):
        raise UserError(f"shards {path} are of grid {manifest['grid']}, not {list(clip.visual.patch_embed.grid_size)}")
    if metric not in manifest["metrics"]:
        raise UserError(f"metric {metric!r} is not in shards {path}; {near(metric, manifest['metrics'])}")
    return manifest["metrics"].index(metric)


def fit_predictor(
    data: Ranked,
    grid_size: tuple[int, int],
    name: str = "mix_mlp",
    loss: str = "bce",
    epochs: int = 50,
    lr: float = 1e-3,
    seed: int = 0,
    quiet: bool = False,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
    **kwargs,
) -> nn.Module:
    """Trains a predictor on tokens and golden scores; the optimiser is the authors' (Adam, cosine to a tenth).

    Args:
        data: training images.
        grid_size: of the tokens.
        name, **kwargs: predictor, and its own settings (`dim`, `head`); `prior` has none and needs no training.
        loss: `bce`, `listwise` or `eq8` (which warns).
        seed: of the start and of the order of images; the global generators are left alone.
        after_epoch: called after each epoch, from 1, with the predictor as it stands, in evaluation mode; what it
            raises ends the fitting. Nothing that is fitted depends on it.
    """
    if loss not in LOSSES:
        raise UserError(f"loss {loss!r} does not exist; {near(loss, LOSSES)}")
    if name == "prior":
        prior = Prior.from_scores(data.golden.mean(0), data.patches.shape[-1], grid_size)
        return prior.to(data.patches.device)
    if loss in WARNINGS:
        warnings.warn(WARNINGS[loss], stacklevel=2)
    device = data.patches.device
    order, drawing = torch.Generator().manual_seed(seed), [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=drawing), torch.inference_mode(False):
        torch.manual_seed(seed)
        predictor = create_predictor(name, data.patches.shape[-1], grid_size, **kwargs).to(device).train()
        # inference tensors cannot be saved for backward
        data = Ranked(*(part.clone() if part.is_inference() else part for part in data))
        optimizer = torch.optim.Adam(predictor.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=lr * LAST_LR_SHARE)
        for epoch in progress(range(epochs), desc=f"fit {name}", unit="epoch", disable=quiet):
            for batch in torch.randperm(len(data.golden), generator=order).split(BATCH_SIZE):
                cls, patches, golden = (part[batch.to(device)] for part in data)
                optimizer.zero_grad()
                LOSSES[loss](predictor(cls, patches), golden).backward()
                optimizer.step()
            scheduler.step()
            if after_epoch is not None:
                with torch.random.fork_rng(devices=drawing):
                    after_epoch(epoch + 1, predictor.eval())
                predictor.train()
    return predictor.eval()


@torch.inference_mode()
def matching_on(predictor: nn.Module, data: Ranked) -> float:
    """Matching rate (%) of a predictor on images, as `matching` has it."""
    return matching_rate(predictor(data.cls, data.patches).cpu().numpy(), data.golden.cpu().numpy())


@torch.inference_mode()
def rank_quality(predictor: nn.Module, prior: np.ndarray, data: Ranked) -> dict[str, np.ndarray]:
    """Per image (n,): how a predictor's ranking compares with the golden one, and how the position prior's does."""
    golden = data.golden.cpu().numpy()
    predicted = predictor(data.cls, data.patches).cpu().numpy()
    return {
        "matching": matching_each(predicted, golden),
        "matching_prior": matching_each(prior, golden),
        "kendall": kendall(predicted, golden),
        "ndcg": ndcg(predicted, golden),
    }


def matching(quality: dict[str, np.ndarray], num_tokens: int) -> dict[str, float]:
    """Means of `rank_quality`: matching rate on images that were not fitted on, beside position prior and chance."""
    means = {key: float(values.mean()) for key, values in quality.items()}
    return {
        "matching_rate": means.pop("matching"),
        **means,
        "matching_chance": 100 * top_k(num_tokens) / num_tokens,
    }


def pooled(parts: Sequence[Ranked]) -> Ranked:
    """Images of several tasks as one set."""
    return parts[0] if len(parts) == 1 else Ranked(*(torch.cat(columns) for columns in zip(*parts)))


def prior_of(data: Ranked) -> np.ndarray:
    """The position prior of the images that a predictor was fitted on."""
    return position_prior(data.golden.cpu().numpy())


def predictor_shape(trial: TrialConfig) -> dict:
    """What a predictor of a trial is built with, beside its name and tower."""
    own = {"dim": trial.predictor.dim, "head": trial.predictor.head}
    return {} if trial.predictor.name == "prior" else own


def describe(clip: Clip, name: str, location: int, metric: str, **kwargs) -> dict:
    """What a predictor file says about itself."""
    visual = clip.visual
    return {
        "name": name,
        "kwargs": kwargs,
        "grid": list(visual.patch_embed.grid_size),
        "embed_dim": visual.embed_dim,
        "location": location,
        "metric": metric,
        "model": {"name": clip.name, "sha256": visual.blocks_sha256()},
    }


def _source(path: str) -> tuple[str, str]:
    """Task and split of a folder of shards."""
    data = read_manifest(path)["data"]
    return data["task"], data["split"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m patchrank.fit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_flags(parser, out="runs/predictor.safetensors")
    parser.add_argument("--shards", required=True, nargs="+", help="folders of golden-rank shards to fit to, pooled")
    parser.add_argument("--val-shards", required=True, help="folder of shards to measure matching on")
    parser.add_argument("--location", type=int, default=4, help="layer, from 1, whose input the predictor reads")
    parser.add_argument("--metric", default="preservation", choices=METRICS, help="golden scores to fit to")
    parser.add_argument("--predictor-name", default="mix_mlp", help="mix_mlp (default), mlp, transformer or prior")
    parser.add_argument("--dim", type=positive, default=16, help="the predictor's width (default: 16)")
    parser.add_argument("--head", default="linear", help="how tokens become scores: linear (default) or mean")
    parser.add_argument("--loss", default="bce", help=f"{', '.join(LOSSES)} (default: bce)")
    parser.add_argument("--epochs", type=positive, default=50, help="default: 50")
    parser.add_argument("--lr", type=positive_float, default=1e-2, help="learning rate at the start (default: 0.01)")
    args = parser.parse_args(argv)
    clip, started = create_clip_from(args), time.time()
    check_location(args.predictor_name, args.location)
    for path in args.shards:
        if _source(path) == _source(args.val_shards):
            what = "/".join(_source(path))
            raise UserError(f"--val-shards {args.val_shards}: of {what}, as --shards {path}; take a split of its own")
    train = pooled([read_ranked(clip, path, args.metric, args.location) for path in args.shards])
    val = read_ranked(clip, args.val_shards, args.metric, args.location)
    shape = {} if args.predictor_name == "prior" else {"dim": args.dim, "head": args.head}
    how = {key: getattr(args, key) for key in ("loss", "epochs", "lr", "seed")}
    predictor = fit_predictor(train, clip.visual.patch_embed.grid_size, args.predictor_name, **how, **shape)
    about = describe(clip, args.predictor_name, args.location, args.metric, **shape)
    save_predictor(predictor, args.out, about)
    print(f"predictor: {args.out}", file=sys.stderr)
    found = matching(rank_quality(predictor, prior_of(train), val), clip.visual.num_patches)
    row = {**found, "seconds": round(time.time() - started, 1)}
    where = f"{len(val.golden):,} images of {'/'.join(_source(args.val_shards))}"
    title = f"{args.predictor_name} fitted to {len(train.golden):,} images, measured on {where}"
    print_row(row, title, [*percentages(row, MATCHING), *_lines(row)])


def _lines(row: dict[str, float]) -> list[tuple[str, str]]:
    """What a command's table tells beside the matching rates."""
    return [
        ("Kendall's tau with the golden ranking", f"{row['kendall']:.3f}"),
        ("NDCG of the golden top patches", f"{row['ndcg']:.3f}"),
        ("time", f"{row['seconds']:.1f} s"),
    ]


if __name__ == "__main__":
    run_command(main)
