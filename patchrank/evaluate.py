"""Evaluates pruned inference: accuracy, agreement, cosine, matching rate and MACs as one row.

python -m patchrank.evaluate --data digits --split val --keep-rate 0.6
python -m patchrank.evaluate --model patchrank_clip_b16 --data caltech101 --data-root /data --split test
python -m patchrank.evaluate --model patchrank_clip_b16 --checkpoint clip.pt --data folder --data-root photos
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from patchrank.cli.config_flags import add_config_flags
from patchrank.cli.summary import ACCURACIES, MATCHING, cosine_line, percentages
from patchrank.config import TrialConfig
from patchrank.golden.agreement import matching, prior_of, rank_quality
from patchrank.golden.dataset import read_ranked
from patchrank.models.clip import Clip
from patchrank.models.embed import evaluate
from patchrank.retrieval import measuring_parser, pair_and_split, print_measured, retrieval_from
from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError

VERSION = 2  # of the evaluation and of what records hold: bump it when the same tower would get other figures


def shard_matching(clip: Clip, path: str) -> dict[str, float]:
    """Matching rate of the predictor in use on a folder of golden-rank shards, beside chance."""
    reducer, location = getattr(clip.visual.pruner, "reducer", None), clip.visual.pruning.locations[0]
    if reducer is None or not reducer.fitted or clip.visual.pruning.reducer == "prior":
        raise UserError("a matching rate needs pruning by reducer 'predictor', or another that ranks by a predictor")
    data = read_ranked(clip, path, reducer.about["metric"], location)
    quality = rank_quality(reducer.predictor, prior_of(data), data)
    found = matching(quality, clip.visual.num_patches)
    return {key: value for key, value in found.items() if key != "matching_prior"}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    for flag, task in (("index", "retrieval"), ("controls", "classification")):
        if getattr(args, flag) and args.task != task:
            raise UserError(f"--{flag} goes with --task {task}, which is not given")
    clip, split = pair_and_split(args)
    found = shard_matching(clip, args.shards) if args.shards else {}
    if args.task == "retrieval":
        measured, lines = retrieval_from(args, clip, split)
    else:
        if not split.classes:
            what = "labels are numbers: name them" if split.labels is not None else "classes have no names: give them"
            print(f"{split.task}: {what} with --vocabulary to get answers; without, cosine alone", file=sys.stderr)
        measured = evaluate(clip, split, args.controls, batch_size=args.batch_size, seed=args.seed).row()
        lines = [*percentages(measured, ACCURACIES), cosine_line(measured)]
    print_measured(args, args.task, clip, split, measured | found, [*lines, *percentages(found, MATCHING)])


def _parser() -> argparse.ArgumentParser:
    parser = measuring_parser("evaluate", __doc__)
    what = "retrieval: what patchrank.retrieval measures (default: classification)"
    parser.add_argument("--task", choices=("classification", "retrieval"), default="classification", help=what)
    add_config_flags(parser, TrialConfig, "controls")
    parser.add_argument("--shards", help="folder of golden-rank shards: adds the predictor's matching rate on them")
    return parser


if __name__ == "__main__":
    run_command(main)
