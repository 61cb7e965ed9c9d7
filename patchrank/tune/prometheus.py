"""Figures for Prometheus, through Ray's own metrics: what scoring workers have done, and how far a sweep is.

Ray puts `ray_` before these names and `_total` behind those of counters, and adds the node and the worker.
Where nothing collects them, they lead nowhere and harm nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ray.util.metrics import Counter, Gauge, Metric

from patchrank.golden.shards import ShardFolder
from patchrank.layers.pruning import windows

METRICS = {  # name -> kind, description, and labels
    "patchrank_images_scored": (Counter, "Images that golden scores were made for.", ("task",)),
    "patchrank_windows_scored": (Counter, "Windows that were removed to make them, in all rounds.", ("task",)),
    "patchrank_shard_bytes": (Counter, "Bytes of golden-rank shards that were written.", ("task",)),
    "patchrank_windows_per_second": (Gauge, "Windows a second of the shard that a worker wrote last.", ("task",)),
    "patchrank_trials_planned": (Gauge, "Trials that the sweep is to have.", ("sweep",)),
    "patchrank_trials_done": (Gauge, "Trials that have a record, earlier runs included.", ("sweep",)),
    "patchrank_trials_failed": (Gauge, "Trials that failed in this run.", ("sweep",)),
    "patchrank_best_value": (Gauge, "Best value so far of an objective.", ("sweep", "metric")),
}
REFRESH = 5.0  # seconds; Ray forgets a gauge that nobody has set for twice its report interval, which is 10 seconds


def count_shard(folder: ShardFolder, index: int, seconds: float) -> None:
    """Counts one shard that a scoring worker has written, with the windows of all of its images and rounds."""
    about, golden, images = folder.header, folder.header["golden"], folder.sizes[index]
    squares = len(windows(tuple(about["grid"]), golden["window"], golden["stride"]))
    removed = images * squares * (1 + (golden["rounds"] - 1) * len(about["metrics"]))
    label = {"task": f"{about['data']['task']}/{about['data']['split']}"}
    _metric("patchrank_images_scored").inc(images, label)
    _metric("patchrank_windows_scored").inc(removed, label)
    _metric("patchrank_shard_bytes").inc(folder.record(index)["bytes"], label)
    _metric("patchrank_windows_per_second").set(removed / seconds, label)


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
    kind, description, labels = METRICS[name]
    return kind(name, description, labels)
