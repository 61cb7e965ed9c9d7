"""Phase II: fits a predictor to the golden ranking (section 3.2) by streaming golden-rank shards.

TRAIN=$(python -m patchrank.golden --data digits --split adapt --limit 256 --out runs/shards)
VAL=$(python -m patchrank.golden --data digits --split val --limit 128 --out runs/shards)
python -m patchrank.fit --shards $TRAIN --val-shards $VAL --location 4 --out runs/predictor.safetensors
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.cli.config_flags import add_config_flags, read_config, reader
from patchrank.cli.flags import add_model_flags, create_clip_from
from patchrank.cli.summary import MATCHING, percentages, print_row
from patchrank.config import DEFAULTS, GoldenConfig, PredictorConfig
from patchrank.golden.agreement import matching, prior_of, rank_quality
from patchrank.golden.dataset import Ranked, pooled, read_ranked
from patchrank.golden.shards import read_manifest
from patchrank.layers.predictors import Prior, check_location, create_predictor, save_predictor
from patchrank.models.clip import Clip
from patchrank.utils.command import create_parser, run_command
from patchrank.utils.errors import UserError, near
from patchrank.utils.plain import plain
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
WARNINGS = {"eq8": "loss eq8 is one-sided, as the paper prints it: high scores for all tokens minimise it; try bce"}


def fit_predictor(
    data: Ranked,
    grid_size: tuple[int, int],
    name: str = DEFAULTS.predictor.name,
    loss: str = DEFAULTS.predictor.loss,
    epochs: int = DEFAULTS.predictor.epochs,
    lr: float = DEFAULTS.predictor.lr,
    seed: int = DEFAULTS.seed,
    quiet: bool = False,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
    **kwargs,
) -> nn.Module:
    """Trains a predictor on tokens and golden scores; the optimiser is the authors' (Adam, cosine to a tenth).

    Args:
        data: training images.
        grid_size: of the tokens.
        name: of the predictor; `prior` needs no training.
        loss: `bce`, `listwise` or `eq8` (which warns).
        seed: of the start and of the order of images; the global generators are left alone.
        after_epoch: called after each epoch, from 1, with the predictor as it stands, in evaluation mode; what it
            raises ends the fitting. Nothing that is fitted depends on it.
        **kwargs: the predictor's own settings (`dim`, `head`); `prior` has none.
    """
    epochs, lr, seed, grid_size = plain((epochs, lr, seed, tuple(grid_size)))
    kwargs = {key: plain(value) for key, value in kwargs.items()}
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


def predictor_shape(name: str, dim: int, head: str) -> dict[str, object]:
    """A predictor's own settings, beside its name and tower; a prior has none."""
    return {} if name == "prior" else {"dim": dim, "head": head}


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
    args = _parser().parse_args(argv)
    config = read_config(args, PredictorConfig)
    clip, started = create_clip_from(args), time.time()
    check_location(config.name, args.location)
    for path in args.shards:
        if _source(path) == _source(args.val_shards):
            what = "/".join(_source(path))
            raise UserError(f"--val-shards {args.val_shards}: of {what}, as --shards {path}; take a split of its own")
    train = pooled([read_ranked(clip, path, args.metric, args.location) for path in args.shards])
    val = read_ranked(clip, args.val_shards, args.metric, args.location)
    shape = predictor_shape(config.name, config.dim, config.head)
    how = config.model_dump(include={"name", "loss", "epochs", "lr"})
    predictor = fit_predictor(train, clip.visual.patch_embed.grid_size, seed=args.seed, **how, **shape)
    about = describe(clip, config.name, args.location, args.metric, **shape)
    save_predictor(predictor, args.out, about)
    print(f"predictor: {args.out}", file=sys.stderr)
    found = matching(rank_quality(predictor, prior_of(train), val), clip.visual.num_patches)
    row = {**found, "seconds": round(time.time() - started, 1)}
    where = f"{len(val.golden):,} images of {'/'.join(_source(args.val_shards))}"
    title = f"{config.name} fitted to {len(train.golden):,} images, measured on {where}"
    lines = percentages(row, MATCHING)
    lines += [("Kendall's tau with the golden ranking", f"{row['kendall']:.3f}")]
    lines += [("NDCG of the golden top patches", f"{row['ndcg']:.3f}"), ("time", f"{row['seconds']:.1f} s")]
    print_row(row, title, lines)


def _parser() -> argparse.ArgumentParser:
    parser = create_parser("fit", __doc__)
    add_model_flags(parser, out="runs/predictor.safetensors")
    parser.add_argument("--shards", required=True, nargs="+", help="folders of golden-rank shards to fit to, pooled")
    parser.add_argument("--val-shards", required=True, help="folder of shards to measure matching on")
    first = DEFAULTS.pruning.locations[0]
    what = f"layer, from 1, whose input the predictor reads (default: {first})"
    parser.add_argument("--location", type=reader(int), default=first, help=what)
    add_config_flags(parser, GoldenConfig, "metric")
    add_config_flags(parser, PredictorConfig, "dim", "head", "loss", "epochs", "lr", predictor_name="name")
    return parser


if __name__ == "__main__":
    run_command(main)
