"""Ctrl-C and SIGTERM, which end a sweep in the same way: running trials are dropped, finished ones are kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from patchrank.tune.console import say
from patchrank.utils.errors import UserError

LOST = "another driver has taken this sweep over, so this one ends"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Whether the user asked for an end. While Tune runs it is told; at other times `KeyboardInterrupt` is raised."""

    def __init__(self):
        self.happened = False
        self.lost = threading.Event()  # set once another driver holds the sweep's folder
        self._tune_runs = self._is_told = False

    def check(self) -> None:
        """Lets Tune end, once, where the user asked for that; to be called from its callbacks.

        Tune ends on SIGUSR1. It listens once callbacks are called, and in the main thread alone.
        """
        if self.lost.is_set() and not self.happened:
            say(LOST)
            self.happened = True
        if self.happened and not self._is_told and _in_main_thread():
            self._is_told = True
            os.kill(os.getpid(), signal.SIGUSR1)

    def raise_if_lost(self) -> None:
        """Raises `UserError` once another driver has taken the folder over: nothing may be written there any more."""
        if self.lost.is_set():
            raise UserError(LOST)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handles both signals for the length of a block; in a notebook's side thread they stay as they are."""
        if not _in_main_thread():
            yield
            return
        before = {each: signal.signal(each, self._handle) for each in SIGNALS}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda number, frame: None)  # its default is to kill us
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    @contextmanager
    def told_to_tune(self) -> Iterator[None]:
        """While a block runs Tune, the first signal lets Tune end its trials; a second one does not wait for that."""
        self._tune_runs, self._is_told = True, False
        try:
            yield
        finally:
            self._tune_runs = False

    def _handle(self, number: int, frame: object) -> None:
        is_first, self.happened = not self.happened, True
        if not (self._tune_runs and is_first):
            raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
