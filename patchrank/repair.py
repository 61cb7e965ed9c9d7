"""Repairs a pruned tower: solves its projection anew on unlabelled images, in closed form (docs/method.md).

python -m patchrank.repair --data digits --keep-rate 0.4 --out runs/repair.safetensors
python -m patchrank.evaluate --data digits --keep-rate 0.4 --repair runs/repair.safetensors
python -m patchrank.repair --model patchrank_clip_b16 --data folder --data-root photos --keep-rate 0.5 --images 600

A repair belongs to one tower, schedule and ranking, and costs nothing when images are embedded.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchrank.cli.config_flags import add_config_flags, read_config
from patchrank.cli.flags import create_pruned_clip_from, evaluation_row, load_split_from, pruned_parser
from patchrank.cli.saved_pruning import read_pruning
from patchrank.cli.summary import images_line, macs_line, print_row, pruning_title
from patchrank.config import RepairConfig
from patchrank.data.dataset_factory import find_task
from patchrank.data.image_split import ImageSplit
from patchrank.io import check_writable, content_id, resolve
from patchrank.layers.repair import Repair, check_head, fit_projection, own_projection
from patchrank.models.clip import Clip
from patchrank.models.embed import embed_unpruned, evaluate, over_batches, split_batches
from patchrank.models.pruning_cfg import lets_leave
from patchrank.models.repair_files import describe_repair, save_repair
from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError

OUT = "runs/repair.safetensors"
VERSION = 2  # of the solving: bump it when the same images would give another repair
COMPARED = {"accuracy": "accuracy", "agreement": "agreement with the unpruned answers"}


def fit_repair(clip: Clip, splits: Sequence[ImageSplit], ridge: float | None = None, quiet: bool = False) -> Repair:
    """The repair of the pruning that is in force, solved on images whose labels are not read; the pair stays as it is.

    Args:
        splits: images of one or more tasks, at least 50 in all.
        ridge: pull towards the tower's own projection, above 0; chosen on a held-out fifth where it is left out.

    Raises:
        UserError: nothing leaves, prompts are in use, too few images, or a head that is no plain linear layer.
    """
    tower = clip.visual
    if tower.pruner is None:
        raise UserError("a repair needs patches that leave, but the pruning keeps all; try keep_rate 0.6")
    if tower.prompts is not None:
        raise UserError("a repair is solved without prompts, but this tower has some; try set_prompts(None)")
    if tower.pruning.reducer == "golden":
        raise UserError("a repair needs a reducer that ranks by itself, but 'golden' is an oracle; try predictor")
    check_head(tower.head)

    def both(images: Tensor, _: range) -> tuple[Tensor, Tensor]:
        """What enters the projection of the pruned tower, (b, D), and the whole tower's embeddings (b, E)."""
        entering = tower.forward_head(tower.forward_features(images), pre_logits=True)
        return entering.cpu(), tower.forward_whole(images).cpu()

    pairs = [over_batches(clip, split_batches(clip, split, what="repair", quiet=quiet), both) for split in splits]
    entering, whole = (torch.cat([pair[side] for part in pairs for pair in part]) for side in (0, 1))
    solved = fit_projection(entering, whole, *own_projection(tower.head, tower.embed_dim), ridge)
    about = describe_repair(tower, clip.name) | {"data": data_of(splits), "images": len(entering)}
    about |= {"ridge": solved.ridge, "drift_before": solved.drift_before, "drift_after": solved.drift_after}
    headless = isinstance(tower.head, nn.Identity)
    return Repair(solved.weight.float(), solved.bias.float(), about, headless=headless)


def data_of(splits: Sequence[ImageSplit]) -> list[dict]:
    """Which images a repair is solved on; no label is among what is named."""
    return [{"task": each.task, "split": each.split, "ids_sha256": each.ids_sha256()} for each in splits]


def repair_id(clip: Clip, splits: Sequence[ImageSplit], ridge: float | None) -> str:
    """Names all that the repair of the pruning in force depends on."""
    settings = [describe_repair(clip.visual, clip.name), clip.transform_settings(), clip.visual.pruning.seed, ridge]
    return content_id([VERSION, settings, data_of(splits)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = pruned_parser(
        "repair", __doc__, "val, for the row; images to solve on are training ones", OUT, learned=False
    )
    add_config_flags(parser, RepairConfig, *RepairConfig.model_fields)
    args = parser.parse_args(argv)
    task = _check(args)
    config, clip, started = read_config(args, RepairConfig), create_pruned_clip_from(args), time.time()
    train = load_split_from(argparse.Namespace(**vars(args) | {"split": task.training, "limit": config.images}))
    split = _unseen(load_split_from(args, "val"), train)
    repair = fit_repair(clip, [train], config.ridge)
    save_repair(repair, args.out)
    print(f"repair: {args.out}", file=sys.stderr)
    about = repair.about
    row = {"n_repair_images": about["images"], "ridge": about["ridge"], "seconds": round(time.time() - started, 1)}
    row |= {"drift_held_out": about["drift_after"], "drift_held_out_unrepaired": about["drift_before"]}
    row |= _measure(clip, split, args.out) if len(split) else {}
    args.repair = args.out
    row = evaluation_row(args, "repair", clip, split, row)
    print_row(row, pruning_title(args, f"on {args.data}/{split.split}"), _lines(row))


def _check(args: argparse.Namespace) -> object:
    """The task that flags name. Refuses flags that contradict each other, before anything is computed."""
    task = find_task(args.data)
    for flag in ("prompts", "repair"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag}: a repair is solved for the tower without any; try the same command without it")
    if not lets_leave(read_pruning(args)):
        raise UserError("no patch leaves, so there is nothing to repair; try --keep-rate 0.6, or --budget 0.65")
    check_writable(os.path.dirname(resolve(args.out)))
    return task


def _unseen(split: ImageSplit, train: ImageSplit) -> ImageSplit:
    """The images of a split that the repair is not solved on."""
    seen = set(train.ids)
    return split.take([place for place, name in enumerate(split.ids) if name not in seen])


def _measure(clip: Clip, split: ImageSplit, path: str) -> dict[str, float]:
    """Figures of a split with the repair in a file, and the same without as `_unrepaired`."""
    unpruned = embed_unpruned(clip, split)
    before = evaluate(clip, split, unpruned=unpruned).row()
    with clip.applied(repair_path=path):
        after = evaluate(clip, split, unpruned=unpruned).row()
    row = {"drift": 1 - after["cosine"], "drift_unrepaired": 1 - before["cosine"]} | after
    return row | {f"{key}_unrepaired": before[key] for key in (*COMPARED, "cosine") if key in before}


def _lines(row: dict) -> list[tuple[str, str]]:
    lines = []
    for key, label in COMPARED.items():
        if key in row:
            lines.append((label, f"{row[key]:.2f} % (without repair: {row[f'{key}_unrepaired']:.2f} %)"))
    where = "drift" if "drift" in row else "drift_held_out"
    name = "drift (1 - cosine)" if where == "drift" else "drift (1 - cosine) of the held-out fifth"
    lines.append((name, f"{row[where]:.5f} (without repair: {row[f'{where}_unrepaired']:.5f})"))
    lines += [("solved on", f"{row['n_repair_images']:,} images, no labels"), ("ridge", f"{row['ridge']:.3g}")]
    return [*lines, ("time", f"{row['seconds']:.1f} s"), macs_line(row), images_line(row)]


if __name__ == "__main__":
    run_command(main)
