"""Every method in turns with the unpruned tower: the rows of a table."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from patchrank.benchmark.methods import Method
from patchrank.benchmark.mode import Mode
from patchrank.layers.reducers import Reducer
from patchrank.models.model_name import stable_name
from patchrank.utils.clock import Timing, between, device_seconds, in_turns, mark
from patchrank.utils.device import hardware

SHARE_TURNS = 3  # runs from which the share of ranking and matching is taken


def compare(
    methods: Sequence[Method],
    base: nn.Module,
    model: str,
    mode: Mode,
    batch_sizes: Sequence[int],
    repeats: int,
    seed: int = 0,
    quiet: bool = True,
) -> Iterator[list[dict]]:
    """Rows of all methods, for one batch size after the other.

    Args:
        methods: the first of them is the one that all are compared with.
        base: the tower whose images they see.
        repeats: turns that count. In each of them every method runs once, in an order that is drawn anew.

    Raises:
        UserError: a method that cannot be compiled or captured.
    """
    about = {"model": stable_name(model), "img_size": list(base.patch_embed.img_size)}
    compiled = {method.label: mode.compiled(method.tower) for method in methods}
    for batch_size in batch_sizes:
        with mode.running():
            images = mode.random(batch_size, *base.pretrained_cfg["input_size"], seed=seed)
            runs = {}
            for method in methods:
                ready = mode.ready(method.name, compiled[method.label], images)
                runs[method.label] = partial(device_seconds, ready, images)
            timings = in_turns(runs, repeats, seed, desc=f"batch size {batch_size}", quiet=quiet)
            shares = {method.label: reducer_share(method, images) for method in methods}
            peaks = {method.label: peak_memory(compiled[method.label], images) for method in methods}
        whole = timings[methods[0].label]
        rows = []
        for method in methods:
            row = about | {"method": method.name, "batch_size": batch_size}
            row |= _figures(method, timings[method.label], whole, batch_size)
            row |= {"reducer_share": shares[method.label], "peak_memory": peaks[method.label]}
            rows.append(row | {"repeats": repeats} | told(mode))
        yield rows


def told(mode: Mode) -> dict:
    """What a row says of how, on what and when it was measured."""
    how = {name: getattr(mode, name) for name in ("dtype", "compile", "cuda_graphs", "cudnn_attention")}
    return how | {"hardware": hardware(mode.device), "date": f"{datetime.date.today()}"}


def _figures(method: Method, timing: Timing, whole: Timing, batch_size: int) -> dict:
    """What is counted and what is measured of a method, beside the unpruned tower's time `whole`."""
    counted, measured = method.macs_unpruned / method.macs, whole.median / timing.median
    return {
        "keep_rate": method.keep_rate,
        "keep_rate_asked": method.keep_rate_asked,
        "drop_counts": list(method.drop_counts),
        "locations": list(method.locations),
        "images_per_second": batch_size / timing.median,
        "ms": 1000 * timing.median / batch_size,
        "ms_quartiles": [1000 * seconds / batch_size for seconds in timing.quartiles],
        "spread": timing.spread,
        "gmacs": method.macs / 1e9,
        "gmacs_unpruned": method.macs_unpruned / 1e9,
        "counted_speedup": counted,
        "measured_speedup": measured,
        "ratio": measured / counted,
    }


def reducer_share(method: Method, images: Tensor) -> float:
    """The share of a forward's time that ranking and matching take: median of a few runs that count for nothing else.

    The tower runs as it is, neither compiled nor captured, since a clock has no place inside of a graph.
    """
    if method.reducer is None:
        return 0.0
    shares = []
    for _ in range(SHARE_TURNS):
        with timed_reducer(method.reducer, images.is_cuda) as spent:
            whole = device_seconds(method.tower, images)
            shares.append(spent() / whole)
    return float(np.median(shares))


@contextmanager
def timed_reducer(reducer: Reducer, on_gpu: bool) -> Iterator[Callable[[], float]]:
    """Inside of the block, the calls of a reducer's `observe` and `reduce` are timed.

    Yields:
        A function that returns their seconds so far; on a GPU, once the device has been waited for.
    """
    marks: list[tuple] = []

    def timed(call: Callable) -> Callable:
        def timed_call(*args):
            start = mark(on_gpu)
            found = call(*args)
            marks.append((start, mark(on_gpu)))
            return found

        return timed_call

    reducer.observe, reducer.reduce = timed(reducer.observe), timed(reducer.reduce)
    try:
        yield lambda: sum(between(start, end) for start, end in marks)
    finally:
        del reducer.observe, reducer.reduce  # those of its class come back


def peak_memory(run: Callable[[Tensor], object], images: Tensor) -> int | None:
    """Bytes that a forward takes at its peak on a GPU, beside weights and images; None elsewhere."""
    if not images.is_cuda:
        return None
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    run(images)
    torch.cuda.synchronize(images.device)
    return torch.cuda.max_memory_allocated(images.device) - before
