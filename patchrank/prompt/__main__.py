"""Phase III: tunes learned tokens of both towers on a few labelled images of each class (section 3.3).

Or, without labels, visual tokens that bring a pruned tower's embeddings back to the whole one's (--loss distill).

python -m patchrank.prompt --data digits --mode TV --keep-rate 0.6 --shots 16 --seed 1 --out runs/prompts.safetensors
python -m patchrank.evaluate --data digits --prompts runs/prompts.safetensors --keep-rate 0.6
python -m patchrank.prompt --mode V --loss distill --norm-gains --keep-rate 0.4 --out runs/distilled.safetensors
python -m patchrank.prompt --model patchrank_clip_b16 --data caltech101 --data-root /data --mode TV --dry-run
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch

from patchrank.cli.config_flags import add_config_flags, read_config
from patchrank.cli.flags import create_pruned_clip_from, img_size_of, load_split_from, pruned_parser, pruning_from
from patchrank.cli.summary import ACCURACIES, cosine_line, images_line, macs_line, percentages, print_row, pruning_title
from patchrank.config import DataConfig, PromptConfig
from patchrank.data.dataset_factory import find_task
from patchrank.data.image_split import ImageSplit
from patchrank.io import check_writable, content_id, join, read_json, resolve, write_json
from patchrank.models.clip import Clip, macs_row
from patchrank.models.embed import Evaluation, embed_unpruned, evaluate
from patchrank.prompt.batches import check_named, load_train
from patchrank.prompt.presets import complete
from patchrank.prompt.tuning import Tuned, check_distillation, finished, run_id, tune_prompts
from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError

DRY_STEPS = 4  # one that warms up, and those that are timed


def main(argv: Sequence[str] | None = None) -> None:
    split = "val, for the row; images to learn from are drawn from train or adapt"
    parser = pruned_parser("prompt", __doc__, split, out="runs/prompts.safetensors", learned=False)
    add_config_flags(parser, PromptConfig, *PromptConfig.model_fields)
    parser.add_argument("--dry-run", action="store_true", help="print time and memory of a few steps, and stop")
    args = parser.parse_args(argv)
    _check(args)
    clip = create_pruned_clip_from(args)
    clip.check_text()
    config = complete(read_config(args, PromptConfig), clip, args.data)
    check_distillation(config, clip.visual)
    if config.mode == "none":
        _print(args, _row(args, clip, config, evaluate(clip, check_named(load_split_from(args, "val")))))
        return
    train = load_train(args.data, config, args.seed, read_config(args, DataConfig))
    if args.dry_run:
        dry_run(args, clip, train, config)
    else:
        _print(args, _tuned_row(args, clip, config, train))


def _check(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other, and a place that cannot be written to, before anything is computed."""
    task = find_task(args.data)
    if args.prompts is not None:
        raise UserError("--prompts: tuning starts from random tokens or from words; try --words")
    if args.repair is not None:
        raise UserError("--repair: a repair is solved without prompts; try --loss distill, or patchrank.repair alone")
    if args.reducer == "golden":
        raise UserError("--reducer golden ranks images that were scored, and prompts learn from others; try predictor")
    if args.mode == "none" and args.dry_run:
        raise UserError("--dry-run: mode none tunes nothing; try --mode TV")
    if args.mode != "none" and args.split == task.training:
        raise UserError(f"--split {args.split}: prompts are tuned on it, so it tells nothing; try --split val")
    if args.seed < 0:
        raise UserError(f"--seed must be a whole number from 0, but is {args.seed}")
    check_writable(os.path.dirname(resolve(args.out)))


def _print(args: argparse.Namespace, row: dict) -> None:
    """Prints a result row and its table, which has what the prompts changed."""
    title = pruning_title(args, f"on {row['data']}/{row['split']}") + f"; prompts of mode {row['mode']}"
    lines = [*percentages(row, ACCURACIES), cosine_line(row)]
    lines += [("the same, without prompts", f"{row['cosine_zero_shot']:.5f}"), macs_line(row), images_line(row)]
    if row["n_seen_images"]:
        lines += [("learned from", f"{row['n_seen_images']:,} images, {row['n_seen_labels']:,} labels")]
    if row["seconds_per_epoch"] is not None:
        lines += [("time of an epoch", f"{row['seconds_per_epoch']:.1f} s")]
    print_row(row, title, lines)


def _measured(args: argparse.Namespace, config: PromptConfig, name: str | None) -> ImageSplit:
    """The split that a row or an early stop reads, with the labels and names that cross-entropy needs."""
    split = load_split_from(argparse.Namespace(**vars(args) | {"split": name}), "val")
    return split if config.loss == "distill" else check_named(split)


def _tuned_row(args: argparse.Namespace, clip: Clip, config: PromptConfig, train: ImageSplit) -> dict:
    """The result row of tuned prompts. A finished run left its row beside the prompts, and that is read again.

    Raises:
        UserError: the row would be measured on images that the prompts learn from.
    """
    split, val = _measured(args, config, args.split), None
    if shared := set(train.ids) & set(split.ids):
        raise UserError(
            f"split {split.split!r}: {len(shared)} of its {len(split)} images are those that prompts learn from, so it "
            "tells nothing; try --split val"
        )
    if config.patience is not None:  # it reads val, whatever the row is measured on
        val = split if split.split == "val" else _measured(args, config, "val")
    run = run_id(clip, train, val, config, args.seed)
    key = content_id([run, split.task, split.ids_sha256(), split.labels, split.classes, split.templates])
    beside = f"{args.out}.row.json"
    known = read_json(beside)
    if isinstance(known, dict) and known.get("key") == key and finished(args.out, run) is not None:
        return known["row"]
    logs = None if "://" in args.out else f"{args.out}.logs"
    tuned = tune_prompts(clip, train, val, config, args.seed, args.out, logs=logs)
    print(f"prompts: {args.out}", file=sys.stderr)
    unpruned = embed_unpruned(clip, split)
    before = evaluate(clip, split, unpruned=unpruned)
    with clip.applied(prompts=tuned.prompts):
        row = _row(args, clip, config, evaluate(clip, split, unpruned=unpruned), before, tuned)
    write_json(beside, {"key": key, "row": row})
    return row


def _row(
    args: argparse.Namespace,
    clip: Clip,
    config: PromptConfig,
    found: Evaluation,
    before: Evaluation | None = None,
    tuned: Tuned | None = None,
) -> dict:
    """The result row; `before` is the same pruning without prompts, None where there are none."""
    row = {"model": clip.name} | img_size_of(args)
    row |= {"data": args.data, "split": args.split or "val", "n_images": len(found.kept)}
    row |= {"seed": args.seed} | pruning_from(args) | {"mode": config.mode}
    unused = "images" if config.loss == "cross_entropy" else "shots"
    for key in ("num_tokens", "preset", "shots", "images", "epochs", "lr", "norm_gains", "precision"):
        row[key] = None if tuned is None or key == unused else getattr(config, key)
    seen, seconds = ({}, []) if tuned is None else (tuned.about["seen"], tuned.seconds)
    row |= {"loss": config.loss, "n_seen_images": seen.get("images", 0), "n_seen_labels": seen.get("labels", 0)}
    ours, theirs = found.row(), (before or found).row()
    measured = {key: ours[key] for key in ("accuracy", "cosine") if key in ours}
    row |= measured | {f"{key}_zero_shot": theirs[key] for key in measured}
    row |= {key: ours[key] for key in ("accuracy_unpruned", "agreement") if key in ours}
    row["gmacs"] = macs_row(clip)["gmacs"]
    return row | {"seconds_per_epoch": round(sum(seconds) / len(seconds), 3) if seconds else None}


def dry_run(args: argparse.Namespace, clip: Clip, train: ImageSplit, config: PromptConfig) -> None:
    """Takes a few steps and keeps nothing; prints time per step and in all, and the memory that was needed at most.

    Memory is the device's where it counts its own, else the process's; both with the weights of the pair.
    """
    size, steps = config.batch_size, max(1, len(train) // config.batch_size)
    few = config.model_copy(update={"epochs": DRY_STEPS, "patience": None})  # epochs of one step each
    with TemporaryDirectory() as folder:
        times = tune_prompts(clip, train.first(size), None, few, args.seed, join(folder, "prompts"), quiet=True).seconds
    each = sum(times[1:]) / (DRY_STEPS - 1)
    row = {"mode": config.mode, "batch_size": size, "steps": steps * config.epochs, "seconds_per_step": round(each, 4)}
    row |= {"seconds_per_epoch": round(each * steps, 4), "seconds": round(each * steps * config.epochs, 4)}
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    if memory == 0:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = used if sys.platform == "darwin" else 1024 * used  # Linux counts kilobytes
    row["memory_mib"] = round(memory / 2**20)
    lines = [
        ("a step", f"{each:.3f} s, with {size} images"),
        ("an epoch", f"{row['seconds_per_epoch']:.1f} s"),
        ("in all", f"{row['seconds']:.0f} s, {row['steps']:,} steps"),
        ("memory at most", f"{row['memory_mib']:,} MiB"),
    ]
    title = pruning_title(args, f"on {args.data}")
    print_row(row, f"{title}; what tuning prompts of mode {config.mode} takes", lines)


if __name__ == "__main__":
    run_command(main)
