"""A setting against the unpruned tower on the same images, with an interval; and the oracles' subset."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from patchrank.report.results import Setting
from patchrank.utils.stats import Interval, paired_interval


@lru_cache(maxsize=1024)  # table, pictures and sentences of one report ask for the same ones
def change(setting: Setting, task: str | None = None, limit: int | None = None, measure: str = "accuracy") -> Interval:
    """Points by which a measure differs from the unpruned accuracy, paired by image, with its 95 % interval.

    Of test images, or of validation images where no others were looked at. Intervals draw whole groups; there is
    none where all images belong to one (`Interval.is_known`).

    Args:
        task: one task; None for all images of all tasks.
        limit: only the first so many images of each task.
    """
    ours, unpruned = (setting.values(setting.shown(name), task, limit) for name in (measure, "unpruned"))
    return paired_interval(ours.values, unpruned.values, ours.clusters)


def subset(settings: Sequence[Setting]) -> int | None:
    """How many images of each task the oracles saw; None without oracles, or where they saw what all others did."""
    seen = [setting.count(task) for setting in settings if setting.is_oracle for task in setting.tasks]
    others = [setting.count(task) for setting in settings if not setting.is_oracle for task in setting.tasks]
    return min(seen) if seen and others and min(seen) < max(others) else None


def all_tasks(settings: Sequence[Setting]) -> list[str]:
    """The tasks of any setting, in the order in which they are named first."""
    return list(dict.fromkeys(task for setting in settings for task in setting.tasks))


def mean(setting: Setting, measure: str = "accuracy", task: str | None = None, limit: int | None = None) -> float:
    """Over images and seeds; of one task, or of all images of all tasks."""
    return float(setting.values(setting.shown(measure), task, limit).values.mean())
