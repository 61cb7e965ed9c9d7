"""Clocks: turns, medians, and what a GPU's events say."""

import itertools
from types import SimpleNamespace

import torch

from patchrank.utils.clock import Timing, device_seconds, in_turns


def test_each_turn_has_every_run_once_in_an_order_that_changes():
    ran, costs = [], {name: itertools.cycle([1, 2, 3]) for name in "abc"}
    runs = {name: lambda name=name: ran.append(name) or next(costs[name]) for name in "abc"}
    found = in_turns(runs, turns=30, seed=1, warm_up=3)
    turns = [tuple(ran[n : n + 3]) for n in range(0, len(ran), 3)]
    assert len(turns) == 33 and {frozenset(turn) for turn in turns} == {frozenset("abc")}
    assert {turn[0] for turn in turns} == set("abc") and len(set(turns)) == 6
    assert set(found.values()) == {Timing(2.0, (1.0, 3.0))} and found["a"].spread == 1.0
    again = ran.copy()
    ran.clear()
    in_turns(runs, turns=30, seed=1, warm_up=3)
    assert ran == again


def test_the_first_turns_do_not_count():
    costs = iter([9, 9, 1, 2, 3])
    assert in_turns({"a": lambda: next(costs)}, turns=3, warm_up=2) == {"a": Timing(2.0, (1.5, 2.5))}


def test_a_gpu_is_timed_by_its_own_events(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("record")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(f"wait {device}"))
    images = SimpleNamespace(is_cuda=True, device="cuda:1")
    assert device_seconds(lambda _: said.append("run"), images) == 0.25
    assert said == ["wait cuda:1", "record", "run", "record", "wait cuda:1"]
