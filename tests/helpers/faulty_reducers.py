"""Reducers that go wrong, as a user's own might: a sweep names this module in `imports`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from patchrank.layers.reducers import Center, TokenState, register_reducer

MARKS = Path(os.environ.get("FAULTY_MARKS", "."))


def _is_mended(name: str) -> bool:
    return (MARKS / f"{name}-is-mended").exists()


@register_reducer("raising")
class Raising(Center):
    def reduce(self, state: TokenState, k: int) -> TokenState:
        if not _is_mended("raising"):
            raise RuntimeError("no patch | is good enough")
        return super().reduce(state, k)


@register_reducer("not_a_number")
class NotANumber(Center):
    def reduce(self, state: TokenState, k: int) -> TokenState:
        state = super().reduce(state, k)
        return state if _is_mended("not_a_number") else replace(state, tokens=state.tokens * float("nan"))


@register_reducer("endless")
class Endless(Center):
    def reduce(self, state: TokenState, k: int) -> TokenState:
        while not _is_mended("endless"):
            time.sleep(1)
        return super().reduce(state, k)


@register_reducer("fragile")
class Fragile(Center):
    """Takes its worker with it, the first time."""

    def reduce(self, state: TokenState, k: int) -> TokenState:
        mark = MARKS / "fragile-was-here"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reduce(state, k)


@register_reducer("greedy")
class Greedy(Center):
    """Takes memory until somebody stops it."""

    def reduce(self, state: TokenState, k: int) -> TokenState:
        taken = []
        while not _is_mended("greedy") and len(taken) < 32:
            taken.append(np.ones(1 << 27))  # a GiB
            time.sleep(0.05)
        return super().reduce(state, k)
