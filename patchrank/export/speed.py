"""How fast files run beside each other and beside their towers in torch, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from patchrank.export import program_file
from patchrank.export.check import CheckedFile
from patchrank.export.metadata import format_of
from patchrank.export.onnx_session import OnnxFile
from patchrank.models.clip import Clip
from patchrank.utils.clock import in_turns, seconds_of


def time_files(
    files: Sequence[CheckedFile],
    clips: Mapping[str, Clip],
    batch_size: int,
    repeats: int,
    compiled: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> list[dict]:
    """A row for each file and, after the files, for each different tower: milliseconds of an image, in turns.

    All run on as many threads as torch does. `speedup` is that of the first file over each.

    Args:
        clips: by the files' paths.
        compiled: whether `torch.compile` makes one graph of each `.pt2` file.
    """
    runs, generator = {}, torch.Generator().manual_seed(seed)
    for file in files:
        runs[file.path] = _timed(_runner(file.path, compiled), _images(file.about["input"], batch_size, generator))
    for file in files:
        patches, kept = file.about["num_patches"]
        images = torch.randn(batch_size, 3, *file.about["input"]["size"], generator=generator)
        runs.setdefault(
            f"torch, {file.about['model']}, {kept} of {patches} patches kept", _timed(clips[file.path].visual, images)
        )
    timings = in_turns(runs, repeats, seed, desc="speed", quiet=quiet)
    first = timings[files[0].path].median
    return [
        {
            "file": name,
            "batch_size": batch_size,
            "ms_per_image": 1000 * each.median / batch_size,
            "quartiles_ms": [1000 * end / batch_size for end in each.quartiles],
            "speedup": first / each.median,
        }
        for name, each in timings.items()
    ]


def _runner(path: str, compiled: bool) -> Callable[[Tensor], object]:
    """What runs a file as it would be served."""
    if format_of(path) == "pt2":
        module = program_file.load(path)
        return torch.compile(module, dynamic=False) if compiled else module
    session = OnnxFile(path, torch.get_num_threads())
    return lambda images: session.run(images.numpy())


def _images(settings: Mapping, batch_size: int, generator: torch.Generator) -> Tensor:
    """Random images as a file takes them."""
    height, width = settings["size"]
    if settings["dtype"] == "uint8":
        return torch.randint(0, 256, (batch_size, height, width, 3), generator=generator, dtype=torch.uint8)
    return torch.randn(batch_size, 3, height, width, generator=generator)


def _timed(run: Callable[[Tensor], object], images: Tensor) -> Callable[[], float]:
    @torch.inference_mode()
    def once() -> float:
        return seconds_of(run, images)

    return once
