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
from patchrank.models.clip import Clip
from patchrank.models.clip import macs_row as macs_row
from patchrank.models.embed import BATCH_SIZE
from patchrank.models.embed import embed_shared as embed_shared
from patchrank.models.embed import embed_unpruned as embed_unpruned
from patchrank.models.zero_shot import Evaluation as Evaluation
from patchrank.models.zero_shot import evaluate
from patchrank.models.zero_shot import random_scores as random_scores
from patchrank.retrieval import SPLIT, add_index_flag, retrieval_from, retrieval_lines
from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError

VERSION = 2  # of the evaluation and of what records hold: bump it when the same tower would get other figures


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
    """Refuses flags that contradict each other, and places that cannot be written to, before anything is computed."""
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
