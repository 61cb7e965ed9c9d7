"""What the store says of trials under way: a mark of each one, and requests to end one.

<root>/running/<id>.json   written by the worker when a trial starts and after epochs, removed at the trial's end
<root>/running/<id>.stop   somebody wants that trial to end; the driver looks every few seconds

A mark is no record: it is lost and rewritten at no cost, and where no driver is alive it is out of date.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from patchrank.io import join, list_names, read_json, remove, write_atomic
from patchrank.utils.errors import UserError

FOLDER, MARK, REQUEST = "running", ".json", ".stop"
EVERY = 5.0  # seconds between two writes of a mark, and between two looks at requests
PATIENCE = 5.0  # seconds that a store may take to accept a mark, which is worth no longer wait


class Mark:
    """The mark of a trial that is about to run.

    Args:
        values: settings of the swept axes.
    """

    def __init__(self, root: str, sweep: str, identity: str, values: dict[str, object]):
        self.path = join(root, FOLDER, f"{identity}{MARK}")
        self.about = {"id": identity, "sweep": sweep, "values": values, "host": socket.gethostname()}
        self.about |= {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self.began = self.written = time.monotonic()

    def write(self, **reached: object) -> None:
        """Writes the mark, with the seconds that the trial has run by its own clock. A store that fails is let be."""
        self.written = time.monotonic()
        known = self.about | reached | {"seconds": round(self.written - self.began, 1), "written": time.time()}
        with suppress(UserError):
            write_atomic(self.path, json.dumps(known), PATIENCE)

    def pulse(self, of: str, epoch: int, epochs: int) -> None:
        """Notes how far a training is, at most every `EVERY` seconds."""
        if time.monotonic() - self.written > EVERY:
            self.write(of=of, epoch=epoch, epochs=epochs)


@contextmanager
def marked(root: str, sweep: str, identity: str, values: dict[str, object]) -> Iterator[Mark]:
    """Marks a trial as running for the length of a block."""
    mark = Mark(root, sweep, identity, values)
    mark.write()
    try:
        yield mark
    finally:
        unmark(root, identity)


def unmark(root: str, identity: str, kind: str = MARK) -> None:
    """Removes a mark, or a request, if it is there and the store lets us."""
    with suppress(UserError, OSError):
        remove(join(root, FOLDER, f"{identity}{kind}"))


def marks(root: str) -> list[dict]:
    """The marks that there are, by id."""
    found = (read_json(join(root, FOLDER, f"{identity}{MARK}")) for identity in sorted(_named(root, MARK)))
    return [mark for mark in found if mark is not None]


def requests(root: str) -> set[str]:
    """Ids of the trials that somebody wants to end."""
    return _named(root, REQUEST)


def request_stop(root: str, identity: str) -> None:
    """Asks the driver at work to end a trial. Raises `UserError` where nothing can be written."""
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    write_atomic(join(root, FOLDER, f"{identity}{REQUEST}"), json.dumps(about))


def clear(root: str, has_ended: Callable[[str], object]) -> None:
    """Removes all marks, and the requests of trials that have ended: no trial may be running."""
    with suppress(UserError):
        for identity in _named(root, MARK):
            unmark(root, identity)
        for identity in filter(has_ended, requests(root)):
            unmark(root, identity, REQUEST)


def _named(root: str, kind: str) -> set[str]:
    names = list_names(join(root, FOLDER))
    return {name.removesuffix(kind) for name in names if name.endswith(kind) and not name.startswith(".")}
