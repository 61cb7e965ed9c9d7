"""Ctrl-C and SIGTERM, which end a sweep in the same way: what runs is let go, what is finished is kept."""

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
    """Whether somebody asked for an end; `KeyboardInterrupt` wherever Tune is not there to be told of it."""

    def __init__(self):
        self.happened = False
        self.lost = threading.Event()  # the hold on the sweep's folder
        self._tune_runs = self._told = False

    def check(self) -> None:
        """Tells Tune to come to an end, once, where somebody asked for that; to be called from its callbacks.

        SIGUSR1 is Tune's own word for it, and it listens from the time that callbacks are called, in the main thread.
        """
        if self.lost.is_set() and not self.happened:
            say(LOST)
            self.happened = True
        if self.happened and not self._told and _in_main_thread():
            self._told = True
            os.kill(os.getpid(), signal.SIGUSR1)

    def insist(self) -> None:
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
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda number, frame: None)  # which else would kill
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    @contextmanager
    def told_to_tune(self) -> Iterator[None]:
        """While Tune runs, the first signal lets it end its trials; a second does not wait for that."""
        self._tune_runs, self._told = True, False
        try:
            yield
        finally:
            self._tune_runs = False

    def _handle(self, number: int, frame: object) -> None:
        first, self.happened = not self.happened, True
        if not (self._tune_runs and first):
            raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
