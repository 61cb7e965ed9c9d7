"""What the commands share: flags, and the way in which they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from patchrank.errors import UserError
from patchrank.models.clip import Clip, create_clip


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
    parser.add_argument("--checkpoint", help="safetensors file of a pair; default: the weights that ship")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=out, help=f"where results go (default: {out or 'stdout alone'})")


def add_data_flags(parser: argparse.ArgumentParser, split: str, batch_size: int) -> None:
    parser.add_argument("--data", default="digits", help="task")
    parser.add_argument("--data-root", help="folder of the task's images; embedded tasks need none")
    parser.add_argument("--split", default=split)
    parser.add_argument("--limit", type=positive, help="only the first so many images")
    parser.add_argument("--batch-size", type=positive, default=batch_size)


def add_pruning_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep-rate", type=float, default=0.6, help="share of patch tokens left at the end")
    parser.add_argument("--locations", type=int, nargs="+", default=[4, 6, 8, 10], help="layers, from 1")
    parser.add_argument("--reducer", default="predictor")
    parser.add_argument("--leftovers", default="drop")
    parser.add_argument("--predictor", help="safetensors file; default: the predictor that ships")


def create_clip_from(args: argparse.Namespace, **pruning) -> Clip:
    """The pair that `--model`, `--checkpoint` and `--device` name, seeded."""
    check_device(args.device)
    torch.manual_seed(args.seed)
    return create_clip(args.model, checkpoint=args.checkpoint, device=args.device, **pruning)


def check_device(device: str) -> None:
    """Refuses a device that torch does not know or this machine does not have."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = str(error).splitlines()[0].split(". ")[0]  # torch goes on for a page
        raise UserError(f"device {device!r} cannot be used here ({reason}); near: cpu") from error


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command: 0 done, 1 as it says, 2 bad input in one line, 130 interrupted."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
