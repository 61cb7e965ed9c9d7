"""One driver at a time on a folder: a file lock on local paths and NFS, a note on object stores.

A file lock goes with its process. A store has no such locks, so there the driver writes a note with its name and
refreshes it every few seconds. Another driver respects a note that changes, and takes over one that does not.
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
from contextlib import contextmanager, suppress
from threading import Event, Thread

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
    not reach its store for too long.

    Args:
        folder: local path or fsspec URL.
        what: who holds it, for the message that other drivers show.
        refresh, stale: seconds between two refreshes of a note on a store, and without any until it is taken over.

    Raises:
        UserError: another driver holds the folder, or nothing can be written there. On a store it takes up to `refresh`
            seconds to tell, and up to `stale` seconds to take over from a driver that was killed.
    """
    mine = {"what": what, "host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    mine["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    lost = Event()
    with _noted(folder, mine, lost, refresh, stale) if is_remote(folder) else _locked(folder, mine):
        yield lost


@contextmanager
def _locked(folder: str, mine: dict) -> Iterator[None]:
    """Holds a file lock. The note beside it only tells people who holds it."""
    _, path = filesystem_of(folder)
    lock = FileLock(join(path, LOCK), timeout=0)
    try:
        os.makedirs(path, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise _taken(folder, _read(folder)) from error
    except OSError as error:
        raise UserError(f"cannot write {join(folder, LOCK)}: {reason(error)}") from error
    try:
        write_json(join(folder, NOTE), mine)
        yield
    finally:
        with suppress(UserError, OSError):
            remove(join(folder, NOTE))
        lock.release()


@contextmanager
def _noted(folder: str, mine: dict, lost: Event, refresh: float, stale: float) -> Iterator[None]:
    """Holds a note on a store, refreshed by a thread."""
    if not _create(folder, mine):
        _take_over(folder, mine, refresh, stale)
    done = Event()
    thread = Thread(target=_keep_fresh, args=(folder, mine, lost, done, refresh), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=refresh)
        with suppress(UserError, OSError):  # a note that stays is taken over like that of a killed driver
            if _read(folder).get("token") == mine["token"]:
                remove(join(folder, NOTE))


def _take_over(folder: str, mine: dict, refresh: float, stale: float) -> None:
    """Waits until another driver's note is removed or has become stale, and puts ours in its place."""
    theirs, deadline = _read(folder), time.monotonic() + stale
    print(f"{folder}: held by {_who(theirs)}; watching up to {stale:.0f} s for a sign of life", file=sys.stderr)
    while time.monotonic() < deadline:
        time.sleep(refresh / 5)
        found = _read(folder)
        if not found and _create(folder, mine):
            return
        if found != theirs:
            raise _taken(folder, found or _read(folder))
    print(f"{folder}: taking over from {_who(theirs)}, which is gone", file=sys.stderr)
    _write(folder, mine)
    time.sleep(refresh / 5)  # of several drivers that take over at once, the one that writes last has the folder
    if (found := _read(folder)).get("token") != mine["token"]:
        raise _taken(folder, found)


def _keep_fresh(folder: str, mine: dict, lost: Event, done: Event, refresh: float) -> None:
    """Refreshes our note until `done` is set, or sets `lost` where it finds another driver's."""
    while not done.wait(refresh):
        with suppress(UserError, OSError):  # a store that fails now may take it next time
            if _read(folder).get("token") not in (mine["token"], None):
                lost.set()
                return
            _write(folder, mine | {"refreshed": time.time()}, patience=refresh)


def _create(folder: str, mine: dict) -> bool:
    """Writes our note where there is none; returns whether it stands there now."""
    with suppress(FileExistsError):
        _write(folder, mine, mode="create")
    return _read(folder).get("token") == mine["token"]  # a note that exists may be ours, if an answer was lost


def _write(folder: str, note: dict, mode: str = "overwrite", patience: float | None = None) -> None:
    path = join(folder, NOTE)
    filesystem, name = filesystem_of(path)
    content = (json.dumps(note, indent=1) + "\n").encode()
    patiently(path, lambda: put(filesystem, name, content, mode=mode), "write", patience)


def _read(folder: str) -> dict:
    found = read_json(join(folder, NOTE))
    return found if isinstance(found, dict) else {}


def _who(note: dict) -> str:
    known = [f"{key} {note[key]}" for key in ("pid", "host", "since") if key in note]
    return f"{note.get('what', 'another driver')} ({', '.join(known) or 'which left no note'})"


def _taken(folder: str, note: dict) -> UserError:
    return UserError(
        f"{folder}: held by {_who(note)}, and one driver at a time may work on a folder; wait until it ends, stop it, "
        "or name another folder"
    )
