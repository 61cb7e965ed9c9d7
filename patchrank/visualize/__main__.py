"""`python -m patchrank.visualize`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from patchrank.cli.config_flags import add_config_flags, positive, read_config
from patchrank.cli.flags import add_model_flags, create_clip_from
from patchrank.config import DEFAULTS, DataConfig, GoldenConfig, PruningConfig
from patchrank.data.dataset_factory import find_task, load_split
from patchrank.data.digits import scenes as digits
from patchrank.io import check_writable, resolve, write_atomic
from patchrank.models.pretrained import surely_has_text
from patchrank.utils.command import create_parser, run_command
from patchrank.utils.errors import UserError
from patchrank.visualize.figure import draw_rankings
from patchrank.visualize.pictures import Pictures, read_pictures, split_pictures
from patchrank.visualize.rankings import KEEP_RATES

DESCRIPTION = """Draws which patches each ranker keeps, and whether the model's answer survives (figures 3 and 4).

  python -m patchrank.visualize --data digits --limit 4
  python -m patchrank.visualize --rank cls_attention predictor --keep-rates 0.5 --limit 8
  python -m patchrank.visualize --image cat.jpg --classes cat dog --rank preservation random
  python -m patchrank.visualize --rank tome predictor --leftovers merge

Rankers are golden scores of these very images (label, confidence, preservation: oracles) and reducers (predictor,
cls_attention, random, ...). Reducers that merge (tome, feature_merge, guided_merge, ...) show which patches live
together; --leftovers merge shows it of the others."""

OF_FILES, OF_TASKS = ("label", "classes", "template"), ("split", "limit", "data_root", "vocabulary")

GOLDEN = ("window", "stride", "remove_at")  # of golden scores, for the rankers that are made of them
MERGING = ("leftovers", "taper", "align", "metric", "protection", "drop_share")  # how many leave, and how
TEMPLATES = ("a photo of a {}.",)  # for classes of one's own


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    if surely_has_text(args.model):
        _check_classes(args)
    pictures, out = _pictures(args), resolve(args.out)
    check_writable(os.path.dirname(out))
    golden = read_config(args, GoldenConfig).model_dump(include=set(GOLDEN))
    settings = {"keep_rates": args.keep_rates, "locations": args.locations, "seed": args.seed, **golden}
    settings |= read_config(args, PruningConfig).model_dump(include=set(MERGING))
    clip = create_clip_from(args, predictor_path=args.predictor, repair_path=args.repair)
    if clip.has_text:
        _check_classes(args)
    write_atomic(out, draw_rankings(clip, pictures, args.rank, quiet=False, **settings))
    print(out)


def _parser() -> argparse.ArgumentParser:
    parser = create_parser("visualize", DESCRIPTION)
    add_model_flags(parser, out="runs/visualize.png")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="images of your own, in any format Pillow reads")
    parser.add_argument("--label", nargs="+", metavar="NAME", help="with --image: the right class of each")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="with --image: what the model may answer")
    parser.add_argument("--template", nargs="+", help=f"with --image: captions (default: {TEMPLATES[0]!r})")
    parser.add_argument("--data", help=f"task (default, without --image: {DEFAULTS.data.tasks[0]})")
    add_config_flags(parser, DataConfig, "vocabulary", data_root="root")
    parser.add_argument("--split", help="of the task (default: test; of a folder or tars: all)")
    parser.add_argument("--limit", type=positive, help="of the task: its first so many images (default: 4)")
    parser.add_argument("--rank", nargs="+", metavar="NAME", help="rows, from the top (default: those of the paper)")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=KEEP_RATES, help="columns of each image")
    add_config_flags(parser, PruningConfig, "locations", *MERGING)
    parser.add_argument("--predictor", help="safetensors file; default: the predictor that ships")
    what = "repair of this very model and pruning: one ranker, at one keep rate"
    parser.add_argument("--repair", metavar="FILE", help=what)
    add_config_flags(parser, GoldenConfig, *GOLDEN)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together."""
    if args.image and args.data:
        raise UserError("--image and --data exclude each other: give one of them")
    for flag in OF_TASKS if args.image else OF_FILES:
        if getattr(args, flag) is not None:
            other = "--data" if args.image else "--image"
            raise UserError(f"--{flag.replace('_', '-')} goes with {other}, which is not given")


def _check_classes(args: argparse.Namespace) -> None:
    """Refuses images without classes that a text tower could answer with."""
    if args.image and not args.classes and args.model.split(".")[0] != "patchrank_clip_digits":
        raise UserError(f"--classes is needed: name what {args.model} may answer, for example --classes cat dog")


def _pictures(args: argparse.Namespace) -> Pictures:
    if not args.image:
        task = args.data or DEFAULTS.data.tasks[0]
        split = args.split or ("all" if find_task(task).checked else "test")
        found = load_split(task, split, args.limit or 4, args.data_root, args.vocabulary)
        return split_pictures(found, answers=surely_has_text(args.model))
    classes = args.classes or digits.CLASSES
    templates = args.template or (TEMPLATES if args.classes else digits.TEMPLATES)
    return read_pictures(args.image, classes, templates, args.label)


if __name__ == "__main__":
    run_command(main)
