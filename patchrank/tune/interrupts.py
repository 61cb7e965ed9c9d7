"""Ctrl-C and SIGTERM, which end a sweep in the same way: what runs is let go, what is finished is kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from patchrank.tune.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Whether somebody asked for an end; `KeyboardInterrupt` wherever Tune is not there to be told of it."""

    def __init__(self):
        self.happened = False
        self.lost = threading.Event()  # the hold on the sweep's folder
        self._tune_listens = False

    def check(self) -> None:
        """Ends Tune where another driver has taken the folder over, as after this machine had been asleep."""
        if self.lost.is_set() and not self.happened:
            say("another driver has taken this sweep over, so this one ends")
            self.happened = True
            os.kill(os.getpid(), signal.SIGUSR1)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handles both signals for the length of a block; in a notebook's side thread they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self._handle) for each in SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    @contextmanager
    def told_to_tune(self) -> Iterator[None]:
        """While Tune runs, the first signal lets it end its trials; a second does not wait for that."""
        self._tune_listens = True
        try:
            yield
        finally:
            self._tune_listens = False

    def _handle(self, number: int, frame: object) -> None:
        first, self.happened = not self.happened, True
        if not (self._tune_listens and first):
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGUSR1)  # Tune's own word for: come to an end
