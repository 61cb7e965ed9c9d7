"""Phase I: golden scores, written as golden-rank shards (section 3.1).

    python -m patchrank.golden --data digits --split adapt --limit 256 --out runs/shards

Prints the folder of the shards. `--rounds` scores again once the least important tokens have left: the greedy search of
the paper's abstract.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from patchrank.cli.flags import (
    add_data_flags,
    add_model_flags,
    create_clip_from,
    load_split_from,
    positive,
)
from patchrank.data.dataset_factory import find_task
from patchrank.golden.make_shards import make_shards, shard_folder
from patchrank.golden.scores import METRICS
from patchrank.io import resolve
from patchrank.utils.command import run_command


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
