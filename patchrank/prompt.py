"""Phase III: tunes learned tokens of both towers on a few labelled images of each class (section 3.3).

python -m patchrank.prompt --data digits --mode TV --keep-rate 0.6 --shots 16 --seed 1 --out runs/prompts.safetensors
python -m patchrank.evaluate --data digits --prompts runs/prompts.safetensors --keep-rate 0.6
python -m patchrank.prompt --model patchrank_clip_b16 --data caltech101 --data-root /data --mode TV --dry-run
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from itertools import islice

import torch

from patchrank.cli import (
    add_data_flags,
    add_model_flags,
    add_pruning_flags,
    create_clip_from,
    load_split_from,
    positive,
    positive_float,
    run_command,
)
from patchrank.config import PromptConfig, validate
from patchrank.data.images import ImageSplit
from patchrank.data.tasks import find_task
from patchrank.errors import UserError
from patchrank.evaluate import macs_row
from patchrank.files import check_writable, content_id, exists, read_json, resolve, write_json
from patchrank.models.clip import Clip
from patchrank.models.text import template_set
from patchrank.prompting.presets import complete, learning_rates
from patchrank.prompting.shots import Feed, check_named, load_shots
from patchrank.prompting.tuning import accuracy, frozen, run_id, seen, start, step, tune_prompts

PRUNING = ("keep_rate", "locations", "reducer", "leftovers")
DRY_STEPS = 4  # one that warms up, and those that are timed


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    settings = {key: getattr(args, key) for key in PRUNING}
    clip = create_clip_from(args, predictor_path=args.predictor, seed=args.seed, **settings)
    named = {key: getattr(args, key) for key in PromptConfig.model_fields}
    config = complete(validate(PromptConfig, named, "flags"), clip, args.data)
    if config.mode == "none":
        split = check_named(load_split_from(args, "val"))
        print(json.dumps(_row(args, clip, config, split, None, [])))
        return
    templates = None if args.templates is None else template_set(args.templates)
    train = load_shots(args.data, config.shots, args.seed, args.data_root, args.vocabulary, templates)
    if args.dry_run:
        print(json.dumps(dry_run(clip, train, config, args.seed)))
        return
    split = check_named(load_split_from(args, "val"))
    print(json.dumps(_tuned_row(args, clip, config, train, split)))


def _tuned_row(
    args: argparse.Namespace, clip: Clip, config: PromptConfig, train: ImageSplit, split: ImageSplit
) -> dict:
    """The result row; that of a finished run comes from beside its prompts, at once."""
    val = _watched(args, split) if config.patience is not None else None
    run = run_id(clip, train, val, config, args.seed)
    key = content_id([run, split.task, split.ids_sha256(), split.labels, split.classes, split.templates])
    beside = f"{args.out}.row.json"
    known = read_json(beside)
    if known is not None and known["key"] == key and exists(args.out):
        return known["row"]
    logs = None if "://" in args.out else f"{args.out}.logs"
    tuned = tune_prompts(clip, train, val, config, args.seed, args.out, logs=logs)
    print(f"prompts: {args.out}", file=sys.stderr)
    before = accuracy(clip, split)
    clip.set_prompts(tuned.prompts)
    row = _row(args, clip, config, split, before, tuned.seconds) | _seen(seen(train, val, config))
    write_json(beside, {"key": key, "row": row})
    return row


def _row(
    args: argparse.Namespace,
    clip: Clip,
    config: PromptConfig,
    split: ImageSplit,
    before: float | None,
    seconds: Sequence[float],
) -> dict:
    """The result row; `before` is the accuracy without prompts, None where there are none."""
    found, learns = accuracy(clip, split), before is not None
    about = {"model": args.model, "data": args.data, "split": split.split, "n_images": len(split), "seed": args.seed}
    about |= {key: getattr(args, key) for key in PRUNING}
    tuned = {key: getattr(config, key) if learns else None for key in ("num_tokens", "preset", "shots", "epochs", "lr")}
    measured = {"accuracy": found, "accuracy_zero_shot": before if learns else found}
    spent = {"seconds_per_epoch": round(sum(seconds) / len(seconds), 3) if seconds else None}
    return about | {"mode": config.mode} | tuned | _seen({}) | measured | {"gmacs": macs_row(clip)["gmacs"]} | spent


def _seen(of: dict) -> dict[str, int]:
    return {"n_seen_images": of.get("images", 0), "n_seen_labels": of.get("labels", 0)}


def _watched(args: argparse.Namespace, split: ImageSplit) -> ImageSplit:
    """Val, which early stopping reads whatever the row is measured on."""
    if split.split == "val":
        return split
    return check_named(load_split_from(argparse.Namespace(**vars(args) | {"split": "val"})))


def dry_run(clip: Clip, train: ImageSplit, config: PromptConfig, seed: int) -> dict[str, float]:
    """Takes a few steps and keeps nothing: time per step and in all, and the memory that was needed at most.

    Memory is the device's where it counts its own, else the process's; both with the weights of the pair.
    """
    with frozen(clip), torch.inference_mode(False), torch.enable_grad():
        state, feed = start(clip, train, config, seed), Feed(clip, train, config, seed)
        state.optimizer.param_groups[0]["lr"] = learning_rates(config.lr, config.epochs)[0]
        clip.set_prompts(state.prompts)
        times = [time.perf_counter()]
        for epoch in range(DRY_STEPS):
            for rows, labels in islice(feed.batches(epoch), 1):
                step(clip, feed, train, state, rows, labels)  # reads the loss back, and so waits for the device
            times.append(time.perf_counter())
    each = (times[-1] - times[1]) / (DRY_STEPS - 1)
    spent = {"seconds_per_step": each, "seconds_per_epoch": each * feed.steps}
    spent["seconds"] = each * feed.steps * config.epochs
    spent = {key: round(value, 4) for key, value in spent.items()}
    return (
        {"mode": config.mode, "batch_size": config.batch_size, "steps": feed.steps * config.epochs} | spent | _memory()
    )


def _memory() -> dict[str, float]:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        used = torch.cuda.max_memory_allocated()
    else:  # kilobytes, and bytes on macOS
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory_mib": round(used / 2**20)}


def _check(args: argparse.Namespace) -> None:
    """Refuses, before anything is computed, flags that do not go together and a place that cannot be written to."""
    task = find_task(args.data)
    if args.prompts is not None:
        raise UserError("--prompts: tuning starts from random tokens or from words; near: --words, --out")
    if args.mode != "none" and args.split == task.training:
        raise UserError(f"--split {args.split}: prompts are tuned on it, so it tells nothing; near: val")
    check_writable(os.path.dirname(resolve(args.out)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m patchrank.prompt", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_flags(parser, out="runs/prompts.safetensors")
    add_data_flags(parser, "val, for the row; images to learn from are drawn from train or adapt", batch_size=None)
    add_pruning_flags(parser)
    defaults = PromptConfig()
    parser.add_argument("--mode", default=defaults.mode, choices=("none", "T", "V", "TV"), help="whose tokens to learn")
    parser.add_argument("--num-tokens", type=positive, help="default: 16; below 100 patches 4")
    parser.add_argument("--preset", choices=("coop", "maple"), help="default: coop in mode T, else maple")
    parser.add_argument("--shots", type=positive, default=defaults.shots, help="images of each class")
    parser.add_argument("--epochs", type=positive, help="default: the preset's, as for --lr and --batch-size")
    parser.add_argument("--lr", type=positive_float)
    parser.add_argument("--bias", action="store_true", help="gives the map to visual tokens one, as MaPLe does")
    parser.add_argument("--class-specific", action="store_true", help="tokens of each class's own, in mode T")
    parser.add_argument("--words", metavar="TEXT", help="to start from, in place of random tokens")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, help="default: photographs alone")
    parser.add_argument("--patience", type=positive, help="epochs without a better accuracy on val before it stops")
    parser.add_argument("--dry-run", action="store_true", help="print time and memory of a few steps, and stop")
    return parser


if __name__ == "__main__":
    run_command(main)
