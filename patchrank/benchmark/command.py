"""Milliseconds of an image with pruning and without, measured in turns on one machine.

One tower beside itself with nothing pruned:
    python -m patchrank.benchmark --keep-rate 0.6
    python -m patchrank.benchmark --model patchrank_clip_b16 --keep-rate 0.6 --reducer cls_attention --device cuda
Methods beside timm's tower, at the MACs of the paper's schedule or at keep rates:
    python -m patchrank.benchmark --methods timm,predictor,tome,evit --batch-size 1,8 --json rows.json
    python -m patchrank.benchmark --methods predictor,predictor+merge --keep-rates 0.8,0.6 --markdown table.md
Golden scoring beside timm's blocks, and the blocks' time by the number of tokens:
    python -m patchrank.benchmark --golden
    python -m patchrank.benchmark --tokens 9:65:4 --picture tokens.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import nn

from patchrank.benchmark.compare import compare
from patchrank.benchmark.golden_speed import COLUMNS as GOLDEN_COLUMNS
from patchrank.benchmark.golden_speed import NOTE as GOLDEN_NOTE
from patchrank.benchmark.golden_speed import compare_scoring
from patchrank.benchmark.methods import create_base, create_methods, read_methods
from patchrank.benchmark.mode import DTYPES, Mode
from patchrank.benchmark.schedules import Asked
from patchrank.benchmark.table import NOTE, Columns, markdown_page, methods_columns, text_table
from patchrank.benchmark.tokens import COLUMNS as TOKENS_COLUMNS
from patchrank.benchmark.tokens import NOTE as TOKENS_NOTE
from patchrank.benchmark.tokens import check_drawing, draw_tokens, read_counts, time_tokens
from patchrank.benchmark.twin import BENCHMARK, measure
from patchrank.cli.config_flags import add_config_flags, positive, reader, several, thread_count
from patchrank.cli.flags import add_model_flags, add_pruning_flags, create_pruned_clip_from, img_size_of, pruning_from
from patchrank.cli.summary import macs_line, print_row, pruning_title
from patchrank.config import BenchmarkConfig, GoldenConfig, PruningConfig
from patchrank.config.base import Share
from patchrank.io import check_writable, resolve, write_atomic
from patchrank.layers.pruning import windows
from patchrank.models.clip import create_tower
from patchrank.models.model_name import stable_name
from patchrank.models.pretrained import find_weights, is_clip_entry
from patchrank.utils.command import create_parser
from patchrank.utils.device import check_device, hardware
from patchrank.utils.errors import UserError
from patchrank.utils.progress import write_line

TABLE_REPEATS = 5  # turns of a table, where a tower beside itself has those of `BenchmarkConfig`
SCORED = 392  # windows, about, of a run of golden scoring
HOW = ("dtype", "compile", "cuda_graphs", "cudnn_attention")
READ = {  # which flags each kind of benchmark reads, beside those that all of them read
    "one tower": {*PruningConfig.model_fields, "checkpoint", "prompts", "predictor", "repair"},
    "--methods": {"keep_rates", "drop_counts", "budget", "locations", "align", *HOW, "markdown"},
    "--golden": {"window", "remove_at", "dtype", "compile", "cudnn_attention", "markdown"},
    "--tokens": {*HOW, "markdown", "picture"},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    unsaid = argparse.Namespace(repeats=None, batch_size=None, locations=None)  # so that a default is told from a flag
    args = parser.parse_args(argv, unsaid)
    args.places, args.locations = args.locations, args.locations or parser.get_default("locations")
    kind = _kind(args)
    _check_flags(parser, args, kind)
    check_device(args.device)
    for path in (args.out, args.json, args.markdown, args.picture):
        _check_file(path)
    if args.picture is not None:
        check_drawing()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.repeats = args.repeats or (BENCHMARK.repeats if kind == "one tower" else TABLE_REPEATS)
    if kind == "one tower":
        _one_tower(args)
        return
    if kind == "--methods":
        args.methods, args.asked = read_methods(args.methods), _asked(args)
    mode = Mode(args.device, *(getattr(args, name) for name in HOW))
    mode.check()
    base = create_base(args.model, args.img_size, mode, args.seed)
    {"--methods": _methods, "--golden": _golden, "--tokens": _tokens}[kind](args, mode, base, argv)


def _parser() -> argparse.ArgumentParser:
    parser = create_parser("benchmark", __doc__)
    add_model_flags(parser, out=None)
    add_pruning_flags(parser)
    fields = BenchmarkConfig.model_fields
    sizes = f"{fields['batch_size'].description}, or several by commas (default: 32; for --golden about 400 windows)"
    parser.add_argument("--batch-size", type=several(positive), default=BENCHMARK.batch_size, help=sizes)
    turns = f"{fields['repeats'].description} (default: {BENCHMARK.repeats}; {TABLE_REPEATS} for a table)"
    at_least = reader(Annotated[int, fields["repeats"]])
    parser.add_argument("--repeats", type=at_least, default=BENCHMARK.repeats, help=turns)
    parser.add_argument("--threads", type=thread_count, help="that torch may use (default: all cores)")
    names = "a table: timm, timm_cls, open_clip, reducers and RANKING+merge, by commas; timm is always among them"
    parser.add_argument("--methods", metavar="NAMES", help=names)
    rates = "of each method in a table, by commas (default: all at the MACs of the paper's schedule)"
    parser.add_argument("--keep-rates", type=several(reader(Share)), metavar="RATES", help=rates)
    parser.add_argument("--golden", action="store_true", help="a table: windows per second of golden scoring")
    add_config_flags(parser, GoldenConfig, "window", "remove_at")
    lengths = "a table: milliseconds of the blocks by length of the sequence, such as 16:197:8"
    parser.add_argument("--tokens", type=read_counts, metavar="FIRST:LAST:STEP", help=lengths)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of a table's towers (default: fp32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile makes one graph of each tower of a table")
    parser.add_argument("--cuda-graphs", action="store_true", help="each tower of a table is captured and replayed")
    cudnn = "cuDNN's attention comes first, and others where it has no kernel"
    parser.add_argument("--cudnn-attention", action="store_true", help=cudnn)
    parser.add_argument("--json", metavar="FILE", help="where a list of result rows goes")
    parser.add_argument("--markdown", metavar="FILE", help="where a table goes, with its command above it")
    parser.add_argument("--picture", metavar="FILE", help="where a picture of --tokens goes (PNG)")
    return parser


def _kind(args: argparse.Namespace) -> str:
    """Which kind of benchmark is asked for, a key of `READ`. Raises `UserError` for several at once."""
    asked = {"--methods": args.methods is not None, "--golden": args.golden, "--tokens": args.tokens is not None}
    kinds = [kind for kind, wanted in asked.items() if wanted] or ["one tower"]
    if len(kinds) > 1:
        raise UserError(f"{' and '.join(kinds)} are benchmarks of their own; try one of them")
    return kinds[0]


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, kind: str) -> None:
    """Raises `UserError` for a flag that this kind of benchmark would not read, and for batch sizes that it lacks."""
    for name in sorted(set().union(*READ.values()) - READ[kind]):
        if getattr(args, name) != parser.get_default(name):
            raise UserError(_unread(name, kind))
    if kind == "one tower" and len(args.batch_size or ()) > 1:
        raise UserError(
            f"--batch-size: one tower takes one, but there are {len(args.batch_size)}; try --methods predictor"
        )


def _unread(name: str, kind: str) -> str:
    """What is told of a flag that a kind of benchmark does not read, and which kinds do."""
    flag, readers = f"--{name.replace('_', '-')}", [other for other, read in READ.items() if name in read]
    if kind == "one tower":
        return f"a benchmark of one tower does not read {flag}; try it without, or with {' or '.join(readers)}"
    if "one tower" in readers:
        return f"{kind} does not read {flag}; try it without, or leave {kind} out"
    return f"{kind} does not read {flag}; try it without, or {' or '.join(readers)} instead of {kind}"


def _check_file(path: str | None) -> None:
    """Raises `UserError` for a file that cannot be written, before minutes are spent on what it is to hold."""
    if path is None or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)):
        return  # /dev/stdout and its like need no file beside them
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; try a file in it")
    check_writable(os.path.dirname(resolve(path)))


def _asked(args: argparse.Namespace) -> Asked:
    """What flags say of a table's schedules."""
    said = {name: getattr(args, name) for name in ("keep_rates", "drop_counts", "budget", "align")} | {
        "locations": args.places
    }
    return Asked(**{name: tuple(value) if isinstance(value, list) else value for name, value in said.items()})


def _methods(args: argparse.Namespace, mode: Mode, base: nn.Module, argv: Sequence[str]) -> None:
    """A table of methods."""
    methods = create_methods(args.methods, base, args.model, args.asked, mode)
    rows, sizes = [], args.batch_size or [BENCHMARK.batch_size]
    for found in compare(methods, base, args.model, mode, sizes, args.repeats, args.seed, quiet=False):
        write_line(f"{stable_name(args.model)}, batch size {found[0]['batch_size']}")
        write_line(text_table(methods_columns(found), found))
        rows += found
    _write(args, argv, args.asked.title, methods_columns(rows), rows, NOTE)


def _golden(args: argparse.Namespace, mode: Mode, base: nn.Module, argv: Sequence[str]) -> None:
    """A table of ways to score windows."""
    squares, rows = len(windows(base.patch_embed.grid_size, args.window)), []
    for images in args.batch_size or [max(1, SCORED // squares)]:
        what = images, args.window, args.remove_at, args.repeats, args.seed
        rows += compare_scoring(base, args.model, mode, *what, quiet=False)
        write_line(text_table(GOLDEN_COLUMNS, rows[-3:]))
    title = f"Golden scoring, a window of {args.window} x {args.window} removed before layer {args.remove_at}"
    _write(args, argv, title, GOLDEN_COLUMNS, rows, GOLDEN_NOTE)


def _tokens(args: argparse.Namespace, mode: Mode, base: nn.Module, argv: Sequence[str]) -> None:
    """A table and a picture of milliseconds by the number of tokens."""
    sizes = args.batch_size or [BENCHMARK.batch_size]
    rows = time_tokens(base, args.model, mode, args.tokens, sizes, args.repeats, args.seed, quiet=False)
    write_line(text_table(TOKENS_COLUMNS, rows))
    _write(args, argv, "Milliseconds of all blocks by tokens", TOKENS_COLUMNS, rows, TOKENS_NOTE)
    if args.picture is not None:  # last, since rows must not be lost for a picture
        write_atomic(args.picture, draw_tokens(rows))


def _write(
    args: argparse.Namespace, argv: Sequence[str], title: str, columns: Columns, rows: list[dict], note: str = ""
) -> None:
    """Writes the files that flags name, and prints all rows as one line of JSON on stdout."""
    line = json.dumps(rows)
    if args.json:
        write_atomic(args.json, json.dumps(rows, indent=1) + "\n")
    if args.markdown:
        write_atomic(args.markdown, markdown_page(title, argv, columns, rows, note))
    if args.out:
        write_atomic(args.out, line + "\n")
    print(line)


def _one_tower(args: argparse.Namespace) -> None:
    """One tower beside itself with nothing pruned."""
    (batch_size,) = args.batch_size or [BENCHMARK.batch_size]
    settings = pruning_from(args)
    tower = _tower(args, settings)
    found = measure(tower, batch_size, args.repeats, args.seed, quiet=False)
    costs = {"gmacs": tower.macs().image / 1e9, "gmacs_unpruned": tower.macs_unpruned().image / 1e9}
    about = {"model": stable_name(args.model)} | img_size_of(args)
    about |= {"batch_size": batch_size, "repeats": args.repeats}
    about |= {} if args.repair is None else {"repair": args.repair}
    row = about | settings | found | costs | {"hardware": hardware(args.device)}
    if args.json:
        write_atomic(args.json, json.dumps([row], indent=1) + "\n")
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
    ships = is_clip_entry(args.model) and find_weights(args.model).file
    if any((args.checkpoint, args.prompts, args.predictor, args.repair, ships)):
        return create_pruned_clip_from(args).visual
    torch.manual_seed(args.seed)
    tower = create_tower(args.model, img_size=args.img_size, predictor_init="random", seed=args.seed, **settings)
    print("weights are random, which changes no time", file=sys.stderr)
    return tower.to(args.device)
