"""One driver at a time on a folder: a file lock on local paths and NFS, a note on object stores.

A file lock goes with its process. A store has no such locks, so there the driver writes a note with its name and
refreshes it every few seconds. Another driver respects a note that changes, and takes over one that does not. Local
folders have such a note too, which tells people who holds the lock.
It watches the note for that, since the clocks of two machines may differ.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Event, Thread
from typing import NamedTuple

from filelock import FileLock, Timeout

from patchrank.io.files import put, read_json, remove, write_json
from patchrank.io.paths import filesystem_of, is_remote, join
from patchrank.io.retry import patiently, reason
from patchrank.utils.errors import UserError

LOCK, NOTE = ".driver.lock", ".driver.json"
REFRESH = 10.0  # seconds between two refreshes of a note
STALE = 60.0  # seconds without one, after which another driver takes over


@contextmanager
def hold(folder: str, what: str = "driver", refresh: float = REFRESH, stale: float = STALE) -> Iterator[Event]:
    """Holds a folder for the length of a block and makes it if it is not there, so check all input first.

    Yields an event. It is set once another driver has taken a note over, which happens to a driver that slept or could
    not reach its store for too long, and on a file system whose locks hold on one host alone.

    Args:
        folder: local path or fsspec URL.
        what: who holds it, for the message that other drivers show.
        refresh, stale: seconds between two refreshes of a note on a store, and without any until it is taken over.

    Raises:
        UserError: another driver holds the folder, or nothing can be written there. On a store it takes up to `refresh`
            seconds to tell, and up to `stale` seconds to take over from a driver that was killed.
    """
    note, lost, done = _Note(folder, what), Event(), Event()
    with ExitStack() as at_end:  # the last callback runs first
        if not is_remote(folder):
            at_end.callback(_locked(note).release)
            note.write()  # this one only tells people who holds the lock
        elif not note.create():
            note.take_over(refresh, stale)
        at_end.callback(note.remove)
        thread = Thread(target=note.keep_fresh, args=(refresh, done, lost), daemon=True)
        thread.start()
        at_end.callback(thread.join, refresh)
        at_end.callback(done.set)
        yield lost


class Holder(NamedTuple):
    """Who holds a folder, by the note in it.

    is_alive: whether it gave a sign of life within the time after which another driver may take over.
    idle: seconds since the last one; None where only a clock of another host could tell.
    """

    who: str
    is_alive: bool
    idle: float | None


def find_holder(folder: str, refresh: float = REFRESH, stale: float = STALE) -> Holder | None:
    """Who holds a folder; None where nobody does. Reads alone, and takes no lock.

    A note of this very host is judged by its time. Clocks of different hosts are not compared: a note of another one is
    watched until it changes, which takes about `refresh` seconds, or for `stale` seconds if it never does.
    """
    first = found = _Note(folder, "").read()
    if first.get("host") == socket.gethostname() and "refreshed" in first:
        idle = max(0.0, time.time() - first["refreshed"])
        return Holder(_who(first), idle < stale, idle)
    deadline = time.monotonic() + stale
    if first:
        print(f"{folder}: watching up to {stale:.0f} s for a sign of life of {_who(first)}", file=sys.stderr)
    while found == first and found and time.monotonic() < deadline:
        time.sleep(refresh / 5)
        found = _Note(folder, "").read()
    return Holder(_who(found), found != first, None) if found else None


def _locked(note: _Note) -> FileLock:
    """The file lock of a local folder, which is held from then on."""
    _, path = filesystem_of(note.folder)
    lock = FileLock(join(path, LOCK), timeout=0)
    try:
        lock.acquire()  # which makes the folder
    except Timeout as error:
        raise note.taken(note.read()) from error
    except OSError as error:
        raise UserError(f"cannot write {join(note.folder, LOCK)}: {reason(error)}") from error
    return lock


class _Note:
    """The note in a folder that says who holds it; `mine` is ours, and an empty one stands for none."""

    def __init__(self, folder: str, what: str):
        self.folder, self.path = folder, join(folder, NOTE)
        self.mine = {"what": what, "host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self.mine["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")

    def read(self) -> dict:
        return read_json(self.path) or {}

    def is_ours(self) -> bool:
        return self.read().get("token") == self.mine["token"]

    def write(self) -> None:
        write_json(self.path, self.mine | {"refreshed": time.time()})

    def create(self) -> bool:
        """Writes our note to a store where there is none; returns whether it stands there now."""
        filesystem, name = filesystem_of(self.path)
        content = json.dumps(self.mine | {"refreshed": time.time()}).encode()
        with suppress(FileExistsError):
            patiently(self.path, lambda: put(filesystem, name, content, mode="create"), "write")
        return self.is_ours()  # a note that exists may be ours, if an answer was lost

    def remove(self) -> None:
        with suppress(UserError, OSError):  # a note that stays is taken over like that of a killed driver
            if self.is_ours():
                remove(self.path)

    def take_over(self, refresh: float, stale: float) -> None:
        """Waits until another driver's note is removed or has become stale, and puts ours in its place."""
        theirs, deadline = self.read(), time.monotonic() + stale
        print(
            f"{self.folder}: held by {_who(theirs)}; watching up to {stale:.0f} s for a sign of life", file=sys.stderr
        )
        while time.monotonic() < deadline:
            time.sleep(refresh / 5)
            found = self.read()
            if not found and self.create():
                return
            if found != theirs:
                raise self.taken(found or self.read())
        print(f"{self.folder}: taking over from {_who(theirs)}, which is gone", file=sys.stderr)
        self.write()
        time.sleep(refresh / 5)  # of several drivers that take over at once, the one that writes last has the folder
        if not self.is_ours():
            raise self.taken(self.read())

    def keep_fresh(self, refresh: float, done: Event, lost: Event) -> None:
        """Refreshes our note until `done` is set, or sets `lost` where it finds another driver's."""
        while not done.wait(refresh):
            with suppress(UserError, OSError):  # a store that fails now may take it next time
                if self.read().get("token") not in (self.mine["token"], None):
                    lost.set()
                    return
                self.write()

    def taken(self, by: dict) -> UserError:
        rule = "one driver at a time may work on a folder; wait until it ends, stop it, or name another folder"
        return UserError(f"{self.folder}: held by {_who(by)}, and {rule}")


def _who(note: dict) -> str:
    known = [f"{key} {note[key]}" for key in ("pid", "host", "since") if key in note]
    return f"{note.get('what', 'another driver')} ({', '.join(known) or 'which left no note'})"
