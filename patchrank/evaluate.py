"""Evaluates pruned inference: accuracy, agreement, cosine, matching rate and MACs as one row.

python -m patchrank.evaluate --data digits --split val --keep-rate 0.6
python -m patchrank.evaluate --model patchrank_clip_b16 --data caltech101 --data-root /data --split test
python -m patchrank.evaluate --model patchrank_clip_b16 --checkpoint clip.pt --data folder --data-root photos
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.cli.config_flags import add_config_flags
from patchrank.cli.flags import create_pruned_clip_from, evaluation_row, load_split_from, pruned_parser
from patchrank.cli.summary import (
    ACCURACIES,
    MATCHING,
    cosine_line,
    images_line,
    macs_line,
    percentages,
    print_row,
    pruning_title,
)
from patchrank.config import TrialConfig
from patchrank.data.dataset_factory import find_task
from patchrank.data.image_split import ImageSplit
from patchrank.golden.agreement import matching, prior_of, rank_quality
from patchrank.golden.dataset import read_ranked
from patchrank.io import check_writable, resolve
from patchrank.layers.reducers import Random, TokenState
from patchrank.layers.reducers.random import sample_keys
from patchrank.models.clip import Clip
from patchrank.models.clip import macs_row as macs_row
from patchrank.retrieval import SPLIT, add_index_flag, retrieval_from, retrieval_lines
from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError
from patchrank.utils.metrics import percent
from patchrank.utils.progress import progress

VERSION = 2  # of the evaluation and of what records hold: bump it when the same tower would get other figures
CONTROLS = ("random", "reversed")
BATCH_SIZE = 64


@dataclass
class Evaluation:
    """Per image, in the order of the split: what each variant (unpruned, pruned, controls) answered.

    answers: variant -> class indices (n,), none where classes have no names; cosine: variant -> cosine to the unpruned
    embedding (n,). labels (n,), or None; kept (n, K), places of the surviving tokens.
    """

    labels: np.ndarray | None
    answers: dict[str, np.ndarray]
    cosine: dict[str, np.ndarray]
    kept: np.ndarray

    def same(self) -> np.ndarray:
        """Where the pruned tower answers what the unpruned one does."""
        return self.answers["pruned"] == self.answers["unpruned"]

    def right(self, variant: str = "pruned") -> np.ndarray:
        return self.answers[variant] == self.labels

    def row(self) -> dict[str, float]:
        """Percentages: accuracy of every variant, agreement with the unpruned answers; and the mean cosine.

        Without labels there is no accuracy, and without class names no agreement either.
        """
        row: dict[str, float] = {}
        if self.answers and self.labels is not None:
            row = {"accuracy": percent(self.right()), "accuracy_unpruned": percent(self.right("unpruned"))}
            row |= {f"accuracy_{name}": percent(self.right(name)) for name in self.answers if name in CONTROLS}
        row |= {"agreement": percent(self.same())} if self.answers else {}
        return row | {"cosine": float(self.cosine["pruned"].mean())}


@torch.inference_mode()
def evaluate(
    clip: Clip,
    split: ImageSplit,
    controls: Sequence[str] = (),
    scores: np.ndarray | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    quiet: bool = False,
    unpruned: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Evaluation:
    """Zero-shot classification of a split with the pruning and prompts in force, beside the pair as it came.

    What is called unpruned has no prompts either: it is what pruning, and tuning to win it back, are measured by.

    Args:
        controls: also rank at `random` (by `seed` and each image's pixels), or `reversed` (the reducer's, negated).
        scores: (n, N), high = keep, to rank by instead of the reducer's own: oracles.
        unpruned, tokens: (n, E) and (n, P + N, D), what `embed_unpruned` and `embed_shared` gave for these images;
            computed here if left out.
    """
    heads = _heads(clip, split)
    device = clip.logit_scale.device
    parts: list[dict[str, Tensor]] = []
    bar = progress(total=len(split), desc=f"evaluate {split.task}/{split.split}", unit="image", disable=quiet)
    for images, places in split.batches(clip.transform(), batch_size):
        given = None if scores is None else torch.from_numpy(scores[places.start : places.stop]).to(device)
        known = (None if x is None else x[places.start : places.stop].to(device) for x in (unpruned, tokens))
        parts.append(_one_batch(clip.visual, images.to(device), controls, given, seed, *known))
        bar.update(len(images))
    bar.close()
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    kept = joined.pop("kept").cpu().numpy()
    return Evaluation(
        labels=None if split.labels is None else np.asarray(split.labels),
        answers={
            name: (z @ heads[name == "unpruned"].T).argmax(-1).cpu().numpy() for name, z in joined.items() if heads
        },
        cosine={name: (z * joined["unpruned"]).sum(-1).cpu().numpy() for name, z in joined.items()},
        kept=kept,
    )


def _heads(clip: Clip, split: ImageSplit) -> tuple[Tensor, ...]:
    """Class embeddings with the prompts in force and without; none where classes have no names."""
    if not split.classes:
        return ()
    with clip.unprompted():
        plain = clip.zero_shot_head(split.classes, split.templates)
    return clip.zero_shot_head(split.classes, split.templates), plain


def _one_batch(
    tower: nn.Module,
    images: Tensor,
    controls: Sequence[str],
    scores: Tensor | None,
    seed: int,
    unpruned: Tensor | None,
    tokens: Tensor | None,
) -> dict[str, Tensor]:
    pruned = tower.forward_pruned(images, scores, tokens)
    if unpruned is not None:
        whole = unpruned
    else:  # where nothing is pruned or inserted, both are one and the same
        untouched = tower.pruner is None and not tower.num_prompt_tokens
        whole = pruned.embedding if untouched else tower.forward_whole(images)
    out = {"unpruned": whole, "pruned": pruned.embedding}
    if "random" in controls:
        drawn = random_scores(images, tower.num_patches, seed)
        out["random"] = tower.forward_pruned(images, drawn, tokens).embedding
    if "reversed" in controls and pruned.scores is not None:
        out["reversed"] = tower.forward_pruned(images, -pruned.scores, tokens).embedding
    return {name: F.normalize(z, dim=-1) for name, z in out.items()} | {"kept": pruned.kept}


@torch.inference_mode()
def embed_unpruned(clip: Clip, split: ImageSplit, batch_size: int = BATCH_SIZE) -> Tensor:
    """Embeddings (n, E), not normalised, of a split by the tower as it came; many trials share them."""
    tower, device = clip.visual, clip.logit_scale.device
    batches = split.batches(clip.transform(), batch_size)
    return torch.cat([tower.forward_whole(images.to(device)).cpu() for images, _ in batches])


@torch.inference_mode()
def embed_shared(clip: Clip, split: ImageSplit, batch_size: int = BATCH_SIZE) -> Tensor:
    """Tokens (n, P + N, D) as they enter the last layer that the pruning in force does not touch."""
    tower, device = clip.visual, clip.logit_scale.device
    batches = split.batches(clip.transform(), batch_size)
    return torch.cat([tower.forward_prefix(images.to(device), tower.shared_layer).cpu() for images, _ in batches])


def random_scores(images: Tensor, num_tokens: int, seed: int) -> Tensor:
    """Scores (B, N) of the `random` reducer, without a tower."""
    index = torch.arange(num_tokens, device=images.device).expand(len(images), -1)
    state = TokenState(tokens=images, index=index, cls=images, sample_key=sample_keys(images))
    return Random(seed).score(state)


def shard_matching(clip: Clip, path: str) -> dict[str, float]:
    """Matching rate of the predictor in use on a folder of golden-rank shards, beside chance."""
    if clip.visual.pruning.reducer != "predictor" or clip.visual.pruner is None:
        raise UserError("a matching rate needs pruning by reducer 'predictor'")
    reducer, location = clip.visual.pruner.reducer, clip.visual.pruning.locations[0]
    data = read_ranked(clip, path, reducer.about["metric"], location)
    quality = rank_quality(reducer.predictor, prior_of(data), data)
    found = matching(quality, clip.visual.num_patches)
    return {key: value for key, value in found.items() if key != "matching_prior"}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    clip = create_pruned_clip_from(args)
    split = load_split_from(args)
    found = shard_matching(clip, args.shards) if args.shards else {}
    if args.task == "retrieval":
        measured = retrieval_from(args, clip, split)
        lines = retrieval_lines(measured)
    else:
        measured = _classification(args, clip, split)
        lines = [*percentages(measured, ACCURACIES), cosine_line(measured)]
    row = evaluation_row(args, args.task, clip, split, measured) | found
    lines += [*percentages(row, MATCHING), macs_line(row), images_line(row)]
    print_row(row, pruning_title(args, f"on {args.data}/{split.split}"), lines, args.out)


def _check(args: argparse.Namespace) -> None:
    """Refuses, before anything is computed, flags that do not go together and places that cannot be written to."""
    find_task(args.data)
    for flag, task in (("index", "retrieval"), ("controls", "classification")):
        if getattr(args, flag) and args.task != task:
            raise UserError(f"--{flag} goes with --task {task}, which is not given")
    for place in (args.out, args.index):
        if place is not None:
            check_writable(os.path.dirname(resolve(place)))


def _classification(args: argparse.Namespace, clip: Clip, split: ImageSplit) -> dict[str, float]:
    if not split.classes:
        what = "labels are numbers: name them" if split.labels is not None else "classes have no names: give them"
        print(f"{split.task}: {what} with --vocabulary to get answers; without, cosine alone", file=sys.stderr)
    return evaluate(clip, split, args.controls, batch_size=args.batch_size, seed=args.seed).row()


def _parser() -> argparse.ArgumentParser:
    parser = pruned_parser("evaluate", __doc__, SPLIT, batch_size=BATCH_SIZE)
    parser.add_argument(
        "--task",
        choices=("classification", "retrieval"),
        default="classification",
        help="retrieval: what patchrank.retrieval measures (default: classification)",
    )
    add_config_flags(parser, TrialConfig, "controls")
    parser.add_argument("--shards", help="folder of golden-rank shards: adds the predictor's matching rate on them")
    add_index_flag(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
