"""How long runs take, on a CPU or a GPU: clocks, turns, and what is reported of many times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from patchrank.utils.progress import progress

WARM_UP = 3  # runs of each tower that count for nothing


@dataclass(frozen=True)
class Timing:
    """Of many runs: the median and both quartiles, in seconds.

    spread: the distance between the quartiles as a share of the median.
    """

    median: float
    quartiles: tuple[float, float]

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        low, middle, high = np.percentile(seconds, [25, 50, 75]).tolist()
        return cls(middle, (low, high))

    @property
    def spread(self) -> float:
        return (self.quartiles[1] - self.quartiles[0]) / self.median


def in_turns(
    runs: Mapping[str, Callable[[], float]],
    turns: int,
    seed: int = 0,
    warm_up: int = WARM_UP,
    desc: str = "benchmark",
    quiet: bool = True,
) -> dict[str, Timing]:
    """Times runs in turns. Each turn has every run once, in an order that is drawn anew, so that none is always first.

    Whatever else the machine does falls on all of them alike.

    Args:
        runs: what each of them is called, and a call that runs it once and returns its seconds.
        turns: how many turns count, after `warm_up` others.
    """
    draw, names = np.random.default_rng(seed), list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with progress(total=(warm_up + turns) * len(names), desc=desc, unit="run", disable=quiet) as bar:
        for _ in range(warm_up + turns):
            for place in draw.permutation(len(names)):
                seconds[names[place]].append(runs[names[place]]())
                bar.update()
    return {name: Timing.of(values[warm_up:]) for name, values in seconds.items()}


def seconds_of(
    run: Callable[[Tensor], object], images: Tensor, clock: Callable[[], float] = time.perf_counter
) -> float:
    """What one run takes by a clock, waited for on devices that work on their own."""
    wait = partial(torch.cuda.synchronize, images.device) if images.is_cuda else lambda: None
    wait()
    start = clock()
    run(images)
    wait()
    return clock() - start


def device_seconds(run: Callable[[Tensor], object], images: Tensor) -> float:
    """What one run takes: by CUDA's own events on a GPU, and by the wall clock elsewhere."""
    if not images.is_cuda:
        return seconds_of(run, images)
    torch.cuda.synchronize(images.device)
    start = mark(True)
    run(images)
    end = mark(True)
    torch.cuda.synchronize(images.device)
    return between(start, end)


def mark(on_gpu: bool) -> torch.cuda.Event | float:
    """A point in time: of the GPU's queue, or of the wall clock."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Seconds from one mark to another."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
