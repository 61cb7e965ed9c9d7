"""What the driver asks Ray for while shards are made."""

import pytest
from helpers.small_sweep import write_sweep

from patchrank.tune import ray_tasks
from patchrank.tune.plan import make_plan
from patchrank.tune.sweep import load_sweep


class Asked:
    """Stands in for a remote function whose tasks never end."""

    def __init__(self):
        self.tasks = []

    def options(self, **how):
        return self

    def remote(self, *about):
        self.tasks.append(object())
        return self.tasks[-1]


@pytest.mark.parametrize("cancels", [True, False])
def test_an_end_cancels_tasks_only_where_ray_outlives_the_sweep(tmp_path, monkeypatch, cancels):
    write_sweep(tmp_path, "pruning.keep_rate: {grid: [0.9, 0.8]}", reducer="predictor")
    places = [f"root={tmp_path}/runs", f"shards={tmp_path}/shards"]
    plan = make_plan(load_sweep(str(tmp_path / "sweep.yaml"), places))
    asked, cancelled = Asked(), []

    def interrupted(tasks, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_tasks, "score_one", asked)
    monkeypatch.setattr(ray_tasks.ray, "wait", interrupted)
    monkeypatch.setattr(ray_tasks.ray, "cancel", cancelled.append)
    with pytest.raises(KeyboardInterrupt):
        ray_tasks.stage(plan, plan.jobs(), cancels)
    assert asked.tasks and cancelled == (asked.tasks if cancels else [])
