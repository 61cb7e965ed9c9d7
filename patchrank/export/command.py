"""Writes a pruned tower as one file, from pixels to embeddings or class probabilities, and checks such files.

Write a file, its format by its ending: ONNX, or a program of torch.export (.pt2):
    python -m patchrank.export --model patchrank_clip_digits --keep-rate 0.6 --out digits.onnx
    python -m patchrank.export --keep-rate 0.6 --classes zero one two --out digits.onnx --int8 digits.int8.onnx
    python -m patchrank.export --model patchrank_clip_b16 --keep-rate 0.6 --reducer cls_attention --out b16.pt2
Compare files with the tower that made them, and with each other in speed:
    python -m patchrank.export --check digits.onnx digits.int8.onnx --data digits --speed
Ask a file about pictures, without torch:
    python -m patchrank.export --check digits.onnx --image cat.jpg
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

import torch

from patchrank.cli.config_flags import add_config_flags, positive, thread_count
from patchrank.cli.flags import add_model_flags, add_pruning_flags, load_split_from, pruning_from
from patchrank.cli.summary import print_row, pruning_title, table
from patchrank.config import DEFAULTS, DataConfig
from patchrank.data.class_names import read_vocabulary
from patchrank.export.check import TOLERANCE, CheckedFile, compare
from patchrank.export.description import check_same, read_settings
from patchrank.export.metadata import FORMATS, format_of
from patchrank.export.speed import time_files
from patchrank.export.towers import create_pair
from patchrank.export.write import TEMPLATES, check_places, export_tower, has_learned_text, has_own_classes
from patchrank.models.captions import template_set
from patchrank.models.clip import Clip
from patchrank.models.model_name import is_open_clip
from patchrank.utils.command import create_parser
from patchrank.utils.device import hardware
from patchrank.utils.errors import UserError

SETS = ("plain", "openai7", "openai80")
CHECKED = 256  # images of the usual task, where --data names none
TO_CHECK = ("data", "split", "limit", "data_root", "batch_size", "speed", "compile", "threads", "repeats")
UNSAID = ("model", "data")  # None where they are not given, so that a default is told from a flag
OF_MODEL = ("checkpoint", "predictor", "repair", "prompts")
OF_BOTH = ("model", *OF_MODEL, "vocabulary", "seed", "check")


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(UNSAID)))
    _check_flags(parser, args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return _check(args) if args.check else _export(args)


def _parser() -> argparse.ArgumentParser:
    parser = create_parser("export", __doc__)
    add_model_flags(parser, out=None)
    add_pruning_flags(parser)
    parser.add_argument("--format", choices=FORMATS, help="of the file (default: by the ending of --out)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="whose probabilities the file gives too")
    what = f"sentences with {{}} for a class, or a set of them: {', '.join(SETS)} (default: {TEMPLATES[0]!r})"
    parser.add_argument("--templates", nargs="+", metavar="TEXT", help=what)
    what = "the file takes images (B, H, W, 3) of its side in uint8; without, normalised ones (B, 3, H, W)"
    parser.add_argument("--uint8", action="store_true", help=what)
    parser.add_argument("--int8", metavar="FILE", help="where the same goes with int8 weights (ONNX Runtime's dynamic)")
    what = "compares files with the towers that made them; --checkpoint, --predictor, ... as when they were exported"
    parser.add_argument("--check", nargs="+", metavar="FILE", help=what)
    parser.add_argument(
        "--image", nargs="+", metavar="PICTURE", help="with --check FILE: prints the classes of pictures"
    )
    parser.add_argument(
        "--data", default=DEFAULTS.data.tasks[0], help="with --check: images to compare on (docs/data.md)"
    )
    parser.add_argument("--split", help="with --check (default: val; of a folder or tars: all)")
    what = f"with --check: the first so many images (default: {CHECKED}, or all where --data is given)"
    parser.add_argument("--limit", type=positive, help=what)
    add_config_flags(parser, DataConfig, "vocabulary", data_root="root")
    parser.add_argument("--batch-size", type=positive, default=8, help="with --check (default: 8)")
    parser.add_argument("--speed", action="store_true", help="with --check: milliseconds of an image, all in turns")
    parser.add_argument("--compile", action="store_true", help="with --speed: torch.compile of .pt2 files")
    parser.add_argument("--threads", type=thread_count, help="with --check (default: all cores)")
    parser.add_argument("--repeats", type=positive, default=9, help="with --speed: turns (default: 9)")
    return parser


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises `UserError` for a flag that would not be read."""
    if args.device != "cpu":
        raise UserError(f"--device {args.device}: files are traced and checked on the CPU; try it without")
    checks = args.check is not None
    for name, value in vars(args).items():
        unread = name not in (*TO_CHECK, *OF_BOTH) if checks else name in TO_CHECK
        usual = None if name in UNSAID else parser.get_default(name)
        if unread and value is not None and value != usual:
            flag = f"--{name.replace('_', '-')}"
            if checks:
                raise UserError(f"{flag} does not go with --check, which goes by what the file says; try it without")
            raise UserError(f"{flag} goes with --check, which is not given")
    if args.compile and not args.speed:
        raise UserError("--compile goes with --speed, which is not given")
    if args.compile and not any(format_of(path) == "pt2" for path in args.check):
        raise UserError("--compile is of .pt2 files, and --check names none; try it without")


def _export(args: argparse.Namespace) -> int:
    """Writes a file, and says what it is."""
    if args.out is None:
        raise UserError("--out is missing: say where the file goes, such as --out tower.onnx")
    if args.format is not None and format_of(args.out) != args.format:
        raise UserError(f"--out {args.out}: a file of format {args.format} ends in .{args.format}")
    check_places(args.out, args.int8)
    args.model = args.model or DEFAULTS.model.name
    classes, templates = _classes(args)
    settings = {**pruning_from(args), "seed": args.seed}
    settings |= {} if args.img_size is None else {"img_size": args.img_size}
    clip = create_pair(args, args.model, bool(classes), settings)
    if args.templates and (has_learned_text(clip) or has_own_classes(clip)):
        why = "--prompts have learned text" if has_learned_text(clip) else "a classifier answers"
        raise UserError(f"--templates say nothing where {why}; try it without")
    about = export_tower(clip, args.out, classes, templates, args.uint8, args.int8, quiet=False)
    row = {"file": args.out, "int8": args.int8} | {key: value for key, value in about.items() if key != "choices"}
    print_row(row, pruning_title(args, f"as {about['format'].upper()}, {args.out}"), _said(about))
    print(f"  try {_to_check(args)}", file=sys.stderr)  # in one line, which a table would wrap
    return 0


def _classes(args: argparse.Namespace) -> tuple[Sequence[str], Sequence[str]]:
    """Classes, none where the file shall give embeddings alone, and their templates."""
    if args.classes and args.vocabulary:
        raise UserError("--classes and --vocabulary exclude each other: give one of them")
    classes, templates = args.classes or (), None
    if args.vocabulary:
        found = read_vocabulary(args.vocabulary)
        classes, templates = found.classes or (), found.templates
        classes = tuple(classes.values()) if isinstance(classes, dict) else classes
        if not classes:
            raise UserError(f"{args.vocabulary}: classes: has none, which a file needs to name them; try --classes")
    if args.templates and not classes:
        raise UserError("--templates goes with --classes or --vocabulary, which are not given")
    if args.templates and len(args.templates) == 1 and "{" not in args.templates[0]:
        if args.templates[0] not in SETS:
            told = f"a sentence with {{}} for the class, or one of {', '.join(SETS)}"
            raise UserError(f"--templates {args.templates[0]!r}: must be {told}")
        return classes, template_set(args.templates[0])
    return classes, args.templates or templates or TEMPLATES


def _said(about: dict) -> list[tuple[str, str]]:
    before, after = about["num_patches"]
    images = about["input"]
    height, width = images["size"]
    shape = f"{height} x {width} x 3" if images["layout"] == "NHWC" else f"3 x {height} x {width}"
    lines = [("takes", f"images, any number x {shape}, {images['dtype']}"), ("gives", ", ".join(about["outputs"]))]
    if about["classes"]:
        lines.append(("classes", f"{len(about['classes'])}: {', '.join(about['classes'][:8])}"))
    none = "; none leaves, so try --keep-rate 0.6" if before == after else ""
    lines.append(("patches", f"{before}, {after} of them at the end{none}"))
    return lines


def _to_check(args: argparse.Namespace) -> str:
    """The command that compares a file with the tower that it was just made from."""
    words = ["python", "-m", "patchrank.export", "--check", args.out]
    words += ["--model", args.model] if ":" in args.model else []  # entries of ours are named in the file
    for name in OF_MODEL:
        words += [] if getattr(args, name) is None else [f"--{name}", getattr(args, name)]
    return shlex.join(words)


def _check(args: argparse.Namespace) -> int:
    """Compares files with their towers; 1 where one of them does not do what its tower does."""
    files, passed, clips = [CheckedFile(path, args.threads) for path in args.check], True, {}
    args.limit = args.limit or (CHECKED if args.data is None else None)
    args.data = args.data or DEFAULTS.data.tasks[0]
    split = load_split_from(args)
    for file in files:
        clips[file.path] = clip = _tower_of(args, file)
        row = compare(file, clip, split, args.batch_size)
        passed = passed and row.get("passed", True)
        about = {key: file.about[key] for key in ("model", "format", "precision", "schedule")}
        title = f"{file.path}: {about['model']}, {about['format']}, {about['precision']}, on {split.task}/{split.split}"
        print_row({"file": file.path} | about | row, title, _compared(row))
    if args.speed:
        _print_speed(args, time_files(files, clips, args.batch_size, args.repeats, args.compile, args.seed))
    return 0 if passed else 1


def _tower_of(args: argparse.Namespace, file: CheckedFile) -> Clip:
    """The pair that a file was made from."""
    about = file.about
    name = args.model or about["model"]
    if args.model is None and "@" in name:  # which files may lie anywhere
        kind = name.partition(":")[0]
        what, place = ("config", "CONFIG.json") if is_open_clip(name) else ("folder", "FOLDER")
        raise UserError(f"{file.path}: was made with {name}, a {what} of somebody's own; try --model {kind}:{place}")
    clip = create_pair(args, name, bool(about["classes"]), read_settings(about, file.path))
    check_same(about, clip, file.path)
    return clip


def _compared(row: dict) -> list[tuple[str, str]]:
    """The lines of a file's table."""
    count, lines = row["n_images"], []
    if "same_kept" in row:
        lines.append(("scores, at most apart", f"{row['scores_apart']:.1e} of their range"))
        lines.append(("the same patches kept", f"{row['same_kept']:,} of {count:,} images"))
        if others := (count - row["same_kept"]) * ("near_ties" in row):
            lines.append(("other patches by near ties alone", f"{row['near_ties']:,} of {others:,} images"))
        if row.get("contradictions"):
            lines.append(("choices that scores contradict", f"{row['contradictions']:,} of {count:,} images"))
    how = " with the same choices" if "same_kept" in row else ""
    lines.append((f"embeddings, at most apart{how}", f"{row['embedding_apart']:.1e}"))
    if "same_class" in row:
        lines.append((f"probabilities, at most apart{how}", f"{row['probability_apart']:.1e}"))
        lines.append(("the same class as the tower", f"{row['same_class']:,} of {count:,} images"))
    if "accuracy" in row:
        lines.append(("accuracy", f"{row['accuracy']:.2f} % (tower: {row['accuracy_tower']:.2f} %)"))
    elif "same_class" in row:
        lines.append(("accuracy", "unknown: the images have no labels, or classes that the file does not have"))
    lines.append(("drift (1 - cosine) from the tower", f"{row['drift']:.2e}"))
    lines.append(("drift from the unpruned tower", f"{row['drift_unpruned']:.5f}"))
    lines.append(("size", f"{row['bytes'] / 1e6:.1f} MB"))
    if "passed" in row:
        lines.append(("passed", "yes" if row["passed"] else f"no ({TOLERANCE:g} apart would be near enough)"))
    return lines


def _print_speed(args: argparse.Namespace, rows: list[dict]) -> None:
    """A table of milliseconds on stderr, and one line of JSON a row on stdout."""
    figures = [
        (row["file"], f"{row['ms_per_image']:.2f} ms an image, {row['speedup']:.2f} times the first") for row in rows
    ]
    print(table(f"speed at batch size {args.batch_size}, medians of {args.repeats} turns", figures), file=sys.stderr)
    for row in rows:
        print(json.dumps(row | {"hardware": hardware("cpu")}))
