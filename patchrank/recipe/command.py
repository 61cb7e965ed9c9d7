"""Prunes a model of one's own to a budget: from unlabelled images to a folder, in one command.

python -m patchrank.recipe --model patchrank_clip_digits --data digits --budget 0.6 --out runs/my-tower
python -m patchrank.recipe --model timm:vit_base_patch16_siglip_224 --data folder --data-root photos --budget 0.6
python -m patchrank.recipe --model hf:google/siglip-base-patch16-224 --data folder --data-root photos --budget 25ms

It scores patches of training images, fits predictors, tries methods and layers within the budget on other images, and
takes what drifts least. `patchrank.prune(model, FOLDER)` uses the folder. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

import torch

from patchrank.cli.config_flags import add_config_flags, positive
from patchrank.cli.flags import add_model_flags
from patchrank.cli.summary import macs_line, percentages, print_row
from patchrank.config import DataConfig, GoldenConfig, TrialConfig
from patchrank.data.dataset_factory import find_task
from patchrank.io import resolve
from patchrank.recipe.budget import Budget, Settler, read_budget
from patchrank.recipe.candidates import Schedule
from patchrank.recipe.card import LABELS, name_of, remark
from patchrank.recipe.folder import check_folder, write_folder
from patchrank.recipe.forecast import print_forecast
from patchrank.recipe.measured import measure
from patchrank.recipe.tries import Tries, choose
from patchrank.trial.inputs import Inputs, load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import make_needed_shards
from patchrank.utils.command import create_parser
from patchrank.utils.errors import UserError

OUT, WORK = "runs/recipe/model", "runs/recipe/work"
SCORED_AT = Schedule(2, 2)  # golden windows leave before this layer of twelve, wherever a predictor reads
MOST_TEST, FEWEST = 256, 11  # images of a card; images of each part, since cards look up ten neighbours


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    find_task(args.data)
    if args.prompts is not None:
        raise UserError("--prompts: learned tokens have a command of their own; try it without, and patchrank.prompt")
    target, work = check_folder(args.out), resolve(args.work)
    _check_apart(str(target), work)
    base = _base(args)
    torch.manual_seed(args.seed)
    inputs = load_inputs(base.model, base.data, args.device)
    base = base.model_copy(update={"golden": _golden(inputs)})
    whole = base.data.model_copy(update={"n_test": args.n_test})
    tested = Inputs(inputs.clip, whole)
    images = _count(inputs, tested, args)
    settler = Settler(inputs.clip, _budget(args), work)
    tries = Tries(base, inputs, settler, work)
    print_forecast(tries, images)
    make_needed_shards(TrialContext(ResolvedTrial(base), inputs, tries.shards))  # the same for all that is fitted
    choice = choose(tries)
    fixed = _fixed(tries, choice)
    measured = measure(fixed.model_copy(update={"data": whole}), tested, tries.shards, args.batch_size)
    about = {"images": images, "budget": str(settler.budget), "command": _command(argv), "data": args.data}
    about |= {"credit": find_task(args.data).credit}
    about |= {"img_size": list(inputs.clip.visual.patch_embed.img_size)}
    about |= {"given": {"model": args.model, "checkpoint": args.checkpoint}}
    about |= {"within_budget": settler.budget.is_kept_by(measured.figures["ms"])}
    record = write_folder(target, tries, choice, fixed, measured, about)
    _print(record, name_of(choice), args.out)


def _check_apart(target: str, work: str) -> None:
    """Raises `UserError` where one of two folders lies in the other: the first is replaced as a whole."""
    if f"{work}/".startswith(f"{target}/"):
        raise UserError(f"--work {work}: lies in --out {target}, which is replaced as a whole; try another folder")
    if f"{target}/".startswith(f"{work}/"):
        raise UserError(f"--out {target}: lies in --work {work}; try another folder")


def _base(args: argparse.Namespace) -> TrialConfig:
    """The trial that all others differ from: model, data and seed as flags say; no test image is in sight."""
    data = {"tasks": [args.data], "root": args.data_root, "n_train": args.n_train, "n_val": args.n_val, "n_test": 0}
    model = {"name": args.model, "checkpoint": args.checkpoint, "img_size": args.img_size}
    return TrialConfig(seed=args.seed, model=model, data=data)


def _golden(inputs: Inputs) -> GoldenConfig:
    return GoldenConfig(remove_at=SCORED_AT.settings(len(inputs.clip.visual.blocks))["locations"][0])


def _budget(args: argparse.Namespace) -> Budget:
    return Budget(args.budget.share, args.budget.milliseconds, args.batch_size)


def _count(inputs: Inputs, tested: Inputs, args: argparse.Namespace) -> dict[str, int]:
    """How many images there are of each part. Raises `UserError` where they are too few to fit or to choose by."""
    found = {part: len(inputs.split(args.data, part)) for part in ("train", "val")}
    found["test"] = len(tested.split(args.data, "test"))
    for part, count in found.items():
        if count < FEWEST:
            raise UserError(
                f"--data {args.data}: {count} images of part {part!r} are too few, at least {FEWEST} are needed; of a "
                "folder half the images are for training, 20 % for choices and 30 % for the card; try 100 or more"
            )
    return found


def _fixed(tries: Tries, choice: TrialConfig) -> TrialConfig:
    """A setting with the counts that leave in place of a budget, which hold for any host of the same tower."""
    tower = tries.inputs.clip.visual
    with tower.restoring():
        tower.set_pruning(predictor_path=None, predictor_init="random", **choice.pruning.model_dump())
        counts = tuple(tower.pruner.drops.get(layer, 0) for layer in tower.pruning.locations)
    update = {"drop_counts": counts, "budget": None, "taper": 1.0}
    return choice.model_copy(update={"pruning": choice.pruning.model_copy(update=update)})


def _command(argv: Sequence[str] | None) -> str:
    return shlex.join(["python", "-m", "patchrank.recipe", *(sys.argv[1:] if argv is None else argv)])


def _print(record: dict, method: str, folder: str) -> None:
    figures = record["figures"]
    lines = [
        ("drift (1 - cosine)", f"{figures['drift']:.5f} on {figures['n_images']:,} other images"),
        *percentages(figures, LABELS),
        ("milliseconds of an image", f"{figures['ms']:.2f}, unpruned {figures['ms_unpruned']:.2f}{remark(record)}"),
        macs_line(figures),
        ("folder", f"{folder}, with a card in README.md"),
    ]
    print_row(record, f"{record['model']['name']}, {record['budget']}: {method}", lines)


def _parser() -> argparse.ArgumentParser:
    parser = create_parser("recipe", __doc__)
    add_model_flags(parser, OUT, prompts=False)
    usual = TrialConfig().data.tasks[0]
    parser.add_argument("--data", default=usual, help=f"embedded or named task, `folder` or `wds` (default: {usual})")
    add_config_flags(parser, DataConfig, "n_train", "n_val", data_root="root")
    what = f"images of the card's figures (default: {MOST_TEST})"
    parser.add_argument("--n-test", type=positive, default=MOST_TEST, help=what)
    what = "share of the MACs to stay within, such as 0.6, or milliseconds of an image on this machine, such as 12ms"
    parser.add_argument("--budget", type=read_budget, required=True, help=what)
    what = f"images that run at a time where milliseconds are measured (default: {Budget.batch_size})"
    parser.add_argument("--batch-size", type=positive, default=Budget.batch_size, help=what)
    what = f"folder or URL of golden scores, predictors and records of what was tried (default: {WORK})"
    parser.add_argument("--work", default=WORK, help=what)
    return parser
