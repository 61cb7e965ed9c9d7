"""What a file says of pictures: `--check FILE --image PICTURES`. Of ONNX it needs no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from patchrank.data.decoding import decode_viewer, why
from patchrank.export.metadata import format_of, read_archive
from patchrank.export.onnx_session import OnnxFile
from patchrank.export.pixels import to_input
from patchrank.utils.command import create_parser
from patchrank.utils.errors import UserError, one_line

SHOWN = 5  # classes of a picture
DESCRIPTION = "Prints the classes that an exported file finds in pictures; see --help without --image for all else."


def main(argv: Sequence[str]) -> int:
    parser = create_parser("export", DESCRIPTION)
    parser.add_argument("--check", metavar="FILE", nargs="+", required=True, help="an exported file with classes")
    parser.add_argument("--image", nargs="+", metavar="PICTURE", required=True, help="in any format Pillow reads")
    args = parser.parse_args(argv)
    if len(args.check) > 1:
        raise UserError(f"--image asks one file, but --check names {len(args.check)}; try one after the other")
    (file,) = args.check
    run, about = open_file(file)
    if not about["classes"]:
        raise UserError(f"{file}: holds no classes to answer with; try --classes when it is exported")
    code = 0
    for path in args.image:
        try:
            pixels = to_input(read_picture(path), about["input"])
        except UserError as error:  # the others are answered all the same
            print(f"error: {one_line(error)}", file=sys.stderr)
            code = 2
            continue
        print_answer(path, check_width(run(pixels), about["classes"], file), about["classes"])
    return code


def open_file(path: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict]:
    """What gives the probabilities (B, C) of images, and the file's metadata."""
    if format_of(path) == "onnx":
        file = OnnxFile(path)
        return lambda images: file.run(images)["probabilities"], file.about
    about = read_archive(path)
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: a .pt2 file needs torch, which is not installed here; try ONNX") from error
    from patchrank.export.program_file import load

    module = load(path)
    return lambda images: module(torch.from_numpy(images.copy()))[0].detach().numpy(), about


def read_picture(path: str):
    """A picture as a viewer shows it (`PIL.Image.Image`, RGB). Raises `UserError` where it cannot be read."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror or error})") from error
    try:
        return decode_viewer(content)
    except Exception as error:  # Pillow's errors are of nearly every kind
        raise UserError(f"image {path}: cannot be decoded ({why(error, content)})") from error


def check_width(probabilities: np.ndarray, classes: Sequence[str], file: str) -> np.ndarray:
    """The probabilities (B, C) as they are. Raises `UserError` where a file names more or fewer classes."""
    if (found := probabilities.shape[1]) != len(classes):
        raise UserError(f"{file}: names {len(classes)} classes, but gives {found} probabilities; try to export anew")
    return probabilities


def print_answer(path: str, probabilities: np.ndarray, classes: Sequence[str]) -> None:
    """Prints the likeliest classes of one picture: for people on stderr, and as a line of JSON on stdout."""
    (row,) = probabilities
    order = np.argsort(-row, kind="stable")[:SHOWN]
    shown = ", ".join(f"{classes[place]} {100 * row[place]:.1f} %" for place in order)
    print(f"{path}: {shown}", file=sys.stderr, flush=True)
    best = [[classes[place], round(float(row[place]), 6)] for place in order]  # names may be alike
    print(json.dumps({"image": path, "class": classes[order[0]], "probabilities": best}))
