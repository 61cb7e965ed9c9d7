"""Milliseconds of an image with pruning and without, measured in turns on one machine.

python -m patchrank.benchmark --keep-rate 0.6
python -m patchrank.benchmark --model patchrank_clip_b16 --keep-rate 0.6 --reducer cls_attention --device cuda
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import timm
import torch
from torch import Tensor, nn

from patchrank.cli.config_flags import add_config_flags, thread_count
from patchrank.cli.flags import add_model_flags, add_pruning_flags, create_pruned_clip_from, img_size_of, pruning_from
from patchrank.cli.summary import macs_line, print_row, pruning_title
from patchrank.config import DEFAULTS, BenchmarkConfig
from patchrank.models.clip import Clip
from patchrank.models.pretrained import find_weights
from patchrank.utils.command import create_parser, run_command
from patchrank.utils.device import check_device, hardware
from patchrank.utils.errors import UserError
from patchrank.utils.plain import plain
from patchrank.utils.progress import progress

VERSION = 1  # of the measurement: bump it when the same tower would get other milliseconds
BENCHMARK = BenchmarkConfig()
WARM_UP = 3  # runs of each tower that count for nothing


@torch.inference_mode()
def measure(
    model: nn.Module,
    batch_size: int = BENCHMARK.batch_size,
    repeats: int = BENCHMARK.repeats,
    seed: int = DEFAULTS.seed,
    quiet: bool = True,
) -> dict:
    """Milliseconds per image of a pruned tower, and of the same tower with nothing pruned and no prompts.

    The two take turns, so that whatever else the machine does falls on both alike; the first runs are thrown away.

    Args:
        model: a tower of ours or its pair, on the device to be measured.
        batch_size: images of a run, random ones of the size that the tower was made for.
        repeats: runs of each tower that count.

    Returns:
        `ms`, `ms_unpruned` (medians), `speedup` (their ratio), and `ms_quartiles`, `ms_unpruned_quartiles`.

    Raises:
        UserError: a ranking by oracles, which need scores that nobody could have in time.
    """
    batch_size, repeats, seed = plain((batch_size, repeats, seed))
    tower = model.visual if isinstance(model, Clip) else model
    if tower.pruner is not None and tower.pruning.reducer == "golden":
        raise UserError("reducer 'golden' ranks by scores from outside, so it has no time of its own; try prior")
    twin = copy.deepcopy(tower)  # as it came: nothing leaves, nothing is inserted, and all blocks are run in full
    twin.set_prompts(None)
    twin.set_pruning(keep_rate=1.0, drop_counts=None, budget=None, cls_only_last="auto")
    towers = {"ms": tower, "ms_unpruned": twin}
    device = tower.pos_embed.device
    images = torch.randn(batch_size, *tower.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(seed))
    images = images.to(device, tower.pos_embed.dtype)
    times: dict[str, list[float]] = {name: [] for name in towers}
    for _ in progress(range(WARM_UP + repeats), desc="benchmark", unit="turn", disable=quiet):
        for name, each in towers.items():
            times[name].append(1000 * seconds_of(each, images) / batch_size)
    times = {name: values[WARM_UP:] for name, values in times.items()}
    found = {name: float(np.median(values)) for name, values in times.items()}
    quartiles = {f"{name}_quartiles": np.percentile(values, [25, 75]).tolist() for name, values in times.items()}
    return found | {"speedup": found["ms_unpruned"] / found["ms"]} | quartiles


def seconds_of(
    run: Callable[[Tensor], object], images: Tensor, clock: Callable[[], float] = time.perf_counter
) -> float:
    """What one run takes by a clock, waited for on devices that work on their own."""
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    wait()
    start = clock()
    run(images)
    wait()
    return clock() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_parser("benchmark", __doc__)
    add_model_flags(parser, out=None)
    add_pruning_flags(parser)
    add_config_flags(parser, BenchmarkConfig, "batch_size", "repeats")
    parser.add_argument("--threads", type=thread_count, help="that torch may use (default: all cores)")
    args = parser.parse_args(argv)
    check_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = pruning_from(args)
    tower = _tower(args, settings)
    found = measure(tower, args.batch_size, args.repeats, args.seed, quiet=False)
    costs = {"gmacs": tower.macs().image / 1e9, "gmacs_unpruned": tower.macs_unpruned().image / 1e9}
    about = {"model": args.model} | img_size_of(args) | {"batch_size": args.batch_size, "repeats": args.repeats}
    row = about | settings | found | costs | {"hardware": hardware(args.device)}
    print_row(row, pruning_title(args, "with random images"), _lines(row), args.out)


def _lines(row: dict) -> list[tuple[str, str]]:
    """A command's table."""
    machine, lines = row["hardware"], []
    for key, label in (("ms", "an image, pruned"), ("ms_unpruned", "an image, unpruned")):
        low, high = row[f"{key}_quartiles"]
        lines.append((label, f"{row[key]:.3f} ms (quartiles {low:.3f} to {high:.3f})"))
    return [
        *lines,
        ("speed-up", f"{row['speedup']:.2f} times"),
        macs_line(row),
        ("runs of each tower", f"{row['repeats']} of {row['batch_size']} images"),
        ("measured on", machine["gpu"] or f"{machine['cpu']}, threads: {machine['threads']}"),
    ]


def _tower(args: argparse.Namespace, settings: dict) -> nn.Module:
    """The tower with its own weights if flags name some or some ship; a predictor's file fits no others.

    Elsewhere weights are random: they change no time.
    """
    if any((args.checkpoint, args.prompts, args.predictor, find_weights(args.model).file)):
        return create_pruned_clip_from(args).visual
    torch.manual_seed(args.seed)
    tower = timm.create_model(args.model, img_size=args.img_size, predictor_init="random", seed=args.seed, **settings)
    print("weights are random, which changes no time", file=sys.stderr)
    return tower.eval().to(args.device)


if __name__ == "__main__":
    run_command(main)
