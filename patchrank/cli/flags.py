"""What the commands share: flags, what these make, and the way in which commands end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import torch

from patchrank.data.dataset_factory import load_split
from patchrank.data.image_split import ImageSplit
from patchrank.io import cache_folder as cache_folder
from patchrank.io import join
from patchrank.models.clip import Clip, create_clip, macs_row
from patchrank.models.prompt_files import describe
from patchrank.models.text import template_set
from patchrank.utils.device import check_device

PRUNING = ("keep_rate", "locations", "reducer", "leftovers")  # flags of the same names as a trial's settings


def positive(text: str) -> int:
    """A flag's value that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, but is {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """A flag's value that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, but is {text!r}")
    return value


def add_model_flags(parser: argparse.ArgumentParser, out: str | None) -> None:
    """The flags of every stage, with the names that the trial's settings have."""
    parser.add_argument("--model", default="patchrank_clip_digits", help="a timm entrypoint of ours")
    parser.add_argument(
        "--checkpoint",
        help="file of a pair, whoever saved it; default: the tag's own weights",
    )
    parser.add_argument("--prompts", metavar="FILE", help="learned tokens, tuned with this very model")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random (default: 0)")
    parser.add_argument("--out", default=out, help=f"where results go (default: {out or 'stdout alone'})")


def add_data_flags(parser: argparse.ArgumentParser, default_split: str, batch_size: int | None) -> None:
    parser.add_argument("--data", default="digits", help="embedded or named task, `folder` or `wds` (docs/data.md)")
    parser.add_argument("--data-root", help="where the images lie: a folder, a list or tars; embedded tasks need none")
    parser.add_argument("--split", help=f"default: {default_split}")
    parser.add_argument("--limit", type=positive, help="only the first so many images")
    parser.add_argument("--vocabulary", metavar="YAML", help="file of class names and templates")
    parser.add_argument("--templates", metavar="SET", help="plain, openai7 or openai80, in place of all other prompts")
    usual = f"default: {batch_size}" if batch_size else "default: what suits the device"
    parser.add_argument("--batch-size", type=positive, default=batch_size, help=f"how much runs at a time ({usual})")


def load_split_from(args: argparse.Namespace, split: str | None = None) -> ImageSplit:
    """The images that the data flags name; `split` is taken where they name none."""
    templates = None if args.templates is None else template_set(args.templates)
    return load_split(args.data, args.split or split, args.limit, args.data_root, args.vocabulary, templates)


def add_pruning_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep-rate", type=float, default=1.0, help="share of patches left at the end (default: 1)")
    parser.add_argument("--locations", type=int, nargs="+", default=[4, 6, 8, 10], help="layers, from 1")
    parser.add_argument("--reducer", default="predictor", help="who ranks patches (default: predictor)")
    parser.add_argument("--leftovers", default="drop", help="what becomes of the rest (default: drop)")
    parser.add_argument("--predictor", help="safetensors file; default: the predictor that ships")


def create_clip_from(args: argparse.Namespace, **pruning) -> Clip:
    """The pair that `--model`, `--checkpoint`, `--prompts` and `--device` name, seeded."""
    check_device(args.device)
    torch.manual_seed(args.seed)
    clip = create_clip(args.model, checkpoint=args.checkpoint, prompts=args.prompts, device=args.device, **pruning)
    clip.heads = join(cache_folder(), "heads")
    return clip


def create_pruned_clip_from(args: argparse.Namespace) -> Clip:
    """The pair that the model flags name, pruned as the pruning flags say.

    Where `--prompts` were tuned with another pruning, a note on stderr says so.
    """
    pruning = {key: getattr(args, key) for key in PRUNING}
    clip = create_clip_from(args, predictor_path=args.predictor, seed=args.seed, **pruning)
    if clip.prompts is not None:
        theirs, ours = clip.prompts.about.get("pruning", {}), describe(clip)["pruning"]
        other = [f"{key} {value} (here {ours[key]})" for key, value in theirs.items() if ours.get(key) != value]
        if other:
            print(f"note: {clip.prompts.source} was tuned with {', '.join(other)}", file=sys.stderr)
    return clip


def evaluation_row(args: argparse.Namespace, task: str, clip: Clip, split: ImageSplit, measured: Mapping) -> dict:
    """The result row of `evaluate` and `retrieval`: what was asked for, what was measured, what it costs in MACs."""
    asked = ("checkpoint", "data_root", "vocabulary", "templates", "predictor", "prompts", "limit", "seed")
    row = {"task": task, "model": args.model, "data": args.data, "split": split.split}
    row |= {key: getattr(args, key) for key in asked} | {"n_images": len(split), "n_skipped": split.skipped}
    return row | {key: getattr(args, key) for key in PRUNING} | measured | macs_row(clip)
