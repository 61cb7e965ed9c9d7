"""Phase I: golden scores, written as golden-rank shards (section 3.1).

    python -m patchrank.golden --data digits --split adapt --limit 256 --out runs/shards

Prints the folder of the shards. `--rounds` scores again once the least important tokens have left: the greedy search of
the paper's abstract.
"""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.cli.config_flags import add_config_flags, positive, read_config
from patchrank.cli.flags import add_data_flags, add_model_flags, create_clip_from, load_split_from
from patchrank.config import GoldenConfig
from patchrank.data.dataset_factory import find_task
from patchrank.data.image_split import ImageSplit
from patchrank.golden.make_shards import make_shards, shard_folder
from patchrank.golden.precision import autocast_pays
from patchrank.golden.shards import ShardFolder
from patchrank.golden.suffix import AUTOCAST
from patchrank.io import resolve
from patchrank.models.clip import Clip
from patchrank.utils.command import create_parser, run_command
from patchrank.utils.progress import write_line


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_parser("golden", __doc__)
    add_model_flags(parser, out="runs/shards")
    add_data_flags(parser, "the task's training images")
    parser.add_argument("--batch-size", type=positive, help="windows that run at a time (default: by memory)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: pays where there are many images")
    parser.add_argument("--autocast", choices=AUTOCAST, help="half precision, if faster and its ranking agrees")
    add_config_flags(parser, GoldenConfig, *GoldenConfig.model_fields)
    args = parser.parse_args(argv)
    task = find_task(args.data)
    clip = create_clip_from(args)
    split = load_split_from(args, task.training)
    golden, root = read_config(args, GoldenConfig), resolve(args.out)
    folder = _folder(clip, split, golden, root, args.autocast)
    print(make_shards(clip, split, folder, args.batch_size, compile=args.compile))


def _folder(clip: Clip, split: ImageSplit, golden: GoldenConfig, root: str, autocast: str | None) -> ShardFolder:
    """Where shards go: those with autocast only if it pays. What was begun goes on as it began."""
    plain = shard_folder(clip, split, root, **golden.model_dump())
    if autocast is None:
        return plain
    halved = shard_folder(clip, split, root, autocast=autocast, **golden.model_dump())
    if halved.record(0) is not None:
        return halved
    if plain.record(0) is not None:
        write_line(f"autocast {autocast}: these scores were begun without, and go on so: {plain.path}")
        return plain
    return halved if autocast_pays(clip, split, golden, autocast) else plain


if __name__ == "__main__":
    run_command(main)
