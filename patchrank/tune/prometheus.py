"""Figures for Prometheus, through Ray's own metrics: what scoring workers have done, and how far a sweep is.

Ray puts `ray_` before these names and `_total` behind those of counters, and adds the node and the worker.
Where nothing collects them, they lead nowhere and harm nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ray.util.metrics import Counter, Gauge, Metric

COUNTERS = {
    "patchrank_images_scored": "Images that golden scores were made for.",
    "patchrank_windows_scored": "Windows that were removed to make them, in all rounds.",
    "patchrank_shard_bytes": "Bytes of golden-rank shards that were written.",
}
GAUGES = {
    "patchrank_windows_per_second": "Windows a second of the shard that a worker wrote last.",
    "patchrank_trials_planned": "Trials that the sweep is to have.",
    "patchrank_trials_done": "Trials that have a record, earlier runs included.",
    "patchrank_trials_failed": "Trials that failed in this run.",
    "patchrank_best_value": "Best value so far of an objective.",
}
TAGS = {name: ("task",) for name in (*COUNTERS, "patchrank_windows_per_second")} | {
    "patchrank_trials_planned": ("sweep",),
    "patchrank_trials_done": ("sweep",),
    "patchrank_trials_failed": ("sweep",),
    "patchrank_best_value": ("sweep", "metric"),
}
REFRESH = 5.0  # seconds; Ray forgets a gauge that nobody has set for twice its report interval, which is 10 seconds


def count_shard(task: str, images: int, windows: int, seconds: float, num_bytes: int) -> None:
    """Counts one shard that a scoring worker has written; `windows` over all of its images and rounds."""
    amounts = dict(zip(COUNTERS, (images, windows, num_bytes)))
    for name, amount in amounts.items():
        if amount > 0:  # Ray refuses to count nothing
            _metric(name).inc(amount, {"task": task})
    if seconds > 0:
        _metric("patchrank_windows_per_second").set(windows / seconds, {"task": task})


def show_sweep(sweep: str, planned: int, done: int, failed: int, best: Mapping[str, float]) -> None:
    """Shows how far a sweep is; to be called again every `REFRESH` seconds.

    Args:
        best: metric of an objective -> its best value so far; none before the first trial has one.
    """
    for name, count in (("planned", planned), ("done", done), ("failed", failed)):
        _metric(f"patchrank_trials_{name}").set(count, {"sweep": sweep})
    for metric, value in best.items():
        _metric("patchrank_best_value").set(value, {"sweep": sweep, "metric": metric})


@cache
def _metric(name: str) -> Metric:
    if name in COUNTERS:
        return Counter(name, COUNTERS[name], TAGS[name])
    return Gauge(name, GAUGES[name], TAGS[name])


def exported() -> list[str]:
    """Names as Prometheus has them."""
    return [f"ray_{name}_total" for name in COUNTERS] + [f"ray_{name}" for name in GAUGES]
