"""What a row says of a reducer's own time."""

import itertools
import time

import pytest
import torch

from patchrank.benchmark.compare import reducer_share
from patchrank.benchmark.methods import Method
from patchrank.utils import clock


def method_of(tower):
    return Method("some", tower, 1, 1, reducer=tower.pruner.reducer)


@pytest.mark.parametrize(
    "reducer, calls",
    [("predictor", 4), ("tome", 4), ("rank_merge", 5)],  # of which one observes
)
def test_the_share_of_a_reducer_is_that_of_its_own_calls(tower, images, reducer, calls, monkeypatch):
    tower.set_pruning(reducer=reducer, keep_rate=0.6, predictor_init="random")
    ticks = itertools.count()
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # a second passes whenever somebody looks
        patch.setattr(clock, "seconds_of", lambda run, images: run(images) is None or 10.0)
        assert reducer_share(method_of(tower), images) == pytest.approx(calls / 10)
    assert not {"observe", "reduce"} & set(vars(tower.pruner.reducer))


def test_what_leaves_nothing_has_no_share(tower, images):
    assert reducer_share(Method("timm", tower, 1, 1), images) == 0


def test_a_slow_ranking_shows(tower, images, monkeypatch):
    tower.set_pruning(reducer="center", keep_rate=0.6)
    reducer, score, now = tower.pruner.reducer, tower.pruner.reducer.score, [0.0]

    def slow(state):
        now[0] += 3.0
        return score(state)

    def whole(images):
        now[0] += 1.0
        return tower(images)

    def seconds_of(run, images):
        start = now[0]
        run(images)
        return now[0] - start

    with monkeypatch.context() as patch, torch.inference_mode():  # by a clock that no other work on the machine moves
        patch.setattr(reducer, "score", slow)
        patch.setattr(time, "perf_counter", lambda: now[0])
        patch.setattr(clock, "seconds_of", seconds_of)
        assert reducer_share(Method("some", whole, 1, 1, reducer=reducer), images) == pytest.approx(0.75)
