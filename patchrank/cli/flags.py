"""What the commands share: their flags, and the pair, the images and the result row that these ask for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import torch

from patchrank.cli.config_flags import add_config_flags, positive
from patchrank.cli.saved_pruning import read_pruning
from patchrank.config import DEFAULTS, DataConfig, ModelConfig, PruningConfig, TrialConfig
from patchrank.data.dataset_factory import load_split
from patchrank.data.image_split import ImageSplit
from patchrank.io import cache_folder, join
from patchrank.layers.reducers import REDUCERS
from patchrank.models.captions import template_set
from patchrank.models.clip import Clip, create_clip, macs_row
from patchrank.models.prompt_files import describe
from patchrank.models.pruning_cfg import canonical_pruning, check_merging
from patchrank.utils.command import create_parser
from patchrank.utils.device import check_device
from patchrank.utils.errors import UserError

PATHS = ("predictor_path", "repair_path")  # without which a model has what came with it
ALWAYS = ("keep_rate", "locations", "reducer", "leftovers")  # pruning settings that every result row states


def add_model_flags(parser: argparse.ArgumentParser, out: str | None, prompts: bool = True) -> None:
    """The flags of every stage; `--help` is silent on `--prompts` where the stage refuses it."""
    add_config_flags(parser, ModelConfig, "checkpoint", "img_size", model="name")
    what = "learned tokens, tuned with this very model"
    parser.add_argument("--prompts", metavar="FILE", help=what if prompts else argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    add_config_flags(parser, TrialConfig, "seed")
    parser.add_argument("--out", default=out, help=f"where results go (default: {out or 'stdout alone'})")


def add_data_flags(parser: argparse.ArgumentParser, default_split: str) -> None:
    usual = DEFAULTS.data.tasks[0]
    known = f"embedded or named task, `folder` or `wds` (docs/data.md; default: {usual})"
    parser.add_argument("--data", default=usual, help=known)
    parser.add_argument("--split", help=f"default: {default_split}")
    parser.add_argument("--limit", type=positive, help="only the first so many images")
    add_config_flags(parser, DataConfig, "vocabulary", "templates", data_root="root")


def add_pruning_flags(parser: argparse.ArgumentParser, repair: bool = True) -> None:
    """All pruning settings; `--help` is silent on `--repair` where the stage refuses it."""
    add_config_flags(parser, PruningConfig, *PruningConfig.model_fields)
    parser.add_argument("--predictor", help="safetensors file; default: the predictor that ships")
    what = "repair of this very model and pruning (patchrank.repair)"
    parser.add_argument("--repair", metavar="FILE", help=what if repair else argparse.SUPPRESS)


def pruned_parser(
    stage: str,
    description: str,
    default_split: str,
    out: str | None = None,
    batch_size: int | None = None,
    learned: bool = True,
) -> argparse.ArgumentParser:
    """The parser of a stage that runs a pruned pair on the images of a split.

    Args:
        batch_size: None for a stage without a flag for it.
        learned: False for a stage that refuses `--prompts` and `--repair`, since it makes one of them.
    """
    parser = create_parser(stage, description)
    add_model_flags(parser, out, prompts=learned)
    add_data_flags(parser, default_split)
    if batch_size is not None:
        usual = f"images that run at a time (default: {batch_size})"
        parser.add_argument("--batch-size", type=positive, default=batch_size, help=usual)
    add_pruning_flags(parser, repair=learned)
    return parser


def pruning_from(args: argparse.Namespace) -> dict:
    """The settings that `read_pruning` finds, for a result row, and as keyword arguments of an entrypoint.

    Those beside `ALWAYS` are there where they are not at their default.

    Raises:
        UserError: a setting of merging, or a predictor, that the reducer would not read.
    """
    found = canonical_pruning(read_pruning(args))
    reducer = REDUCERS.get(found["reducer"])
    check_merging(found, [found["reducer"]], found["leftovers"])
    if args.predictor and reducer and not reducer.fitted:
        raise UserError(
            f"--predictor {args.predictor}: reducer {found['reducer']!r} reads none; leave it out, or try --reducer "
            "predictor, rank_merge or guided_merge"
        )
    others = [key for key in found if key not in ALWAYS and found[key] is not None]
    return {key: found[key] for key in (*ALWAYS, *others)}


def load_split_from(args: argparse.Namespace, split: str | None = None) -> ImageSplit:
    """The images that the data flags name; `split` is taken where they name none."""
    where = args.data_root, args.vocabulary, template_set(args.templates)
    return load_split(args.data, args.split or split, args.limit, *where)


def create_clip_from(args: argparse.Namespace, **pruning) -> Clip:
    """The pair that `--model`, `--checkpoint`, `--prompts` and `--device` name, seeded."""
    check_device(args.device)
    torch.manual_seed(args.seed)
    files = {"checkpoint": args.checkpoint, "prompts": args.prompts}
    pruning = {name: value for name, value in pruning.items() if name not in PATHS or value is not None}
    clip = create_clip(args.model, device=args.device, img_size=args.img_size, **files, **pruning)
    clip.heads = join(cache_folder(), "heads")
    return clip


def create_pruned_clip_from(args: argparse.Namespace) -> Clip:
    """The pair that the model flags name, pruned as the pruning flags say.

    Where `--prompts` were tuned with another pruning, a note on stderr says so.
    """
    files = {"predictor_path": args.predictor, "repair_path": args.repair}
    clip = create_clip_from(args, seed=args.seed, **files, **pruning_from(args))
    if clip.prompts is not None:
        if other := _other_settings(clip):
            print(f"note: {clip.prompts.source} was tuned with {', '.join(other)}", file=sys.stderr)
    return clip


def _other_settings(clip: Clip) -> list[str]:
    """Pruning settings that the prompts in use were tuned with and that are others here; [] if their file has none."""
    theirs, ours = clip.prompts.about.get("pruning", {}), describe(clip)["pruning"]
    if not theirs:
        return []
    usual = DEFAULTS.pruning.model_dump()  # what settings are that a file does not state
    pairs = {key: (theirs.get(key, usual.get(key)), ours.get(key, usual.get(key))) for key in {**theirs, **ours}}
    return [f"{key} {their} (here {our})" for key, (their, our) in pairs.items() if their != our]


def img_size_of(args: argparse.Namespace) -> dict[str, int]:
    """What a result row says of the images' size: nothing where it is the model's own."""
    return {} if args.img_size is None else {"img_size": args.img_size}


def evaluation_row(args: argparse.Namespace, task: str, clip: Clip, split: ImageSplit, measured: Mapping) -> dict:
    """The result row of `evaluate` and `retrieval`: what was asked for, what was measured, what it costs in MACs."""
    asked = ("checkpoint", "data_root", "vocabulary", "templates", "predictor", "prompts", "repair", "limit", "seed")
    row = {"task": task, "model": clip.name} | img_size_of(args) | {"data": args.data, "split": split.split}
    row |= {key: getattr(args, key) for key in asked}
    row |= {"n_images": len(split), "n_skipped": split.skipped, "passed_over": split.passed_over}
    return row | pruning_from(args) | measured | macs_row(clip)
