"""One driver at a time on a folder: a kernel lock on local paths and NFS, a lease that is renewed on stores.

The kernel lets go of a lock when its holder is killed. A store does not, so there a holder renews what it wrote every
few seconds, and a lease that nobody renews is taken over. Newcomers watch it instead of comparing clocks.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from filelock import FileLock, Timeout

from patchrank.io import exists, filesystem_of, is_remote, join, patiently, read_json, remove, write_atomic
from patchrank.io.files import put
from patchrank.io.retry import reason
from patchrank.utils.errors import UserError

LOCK, NOTE = ".driver.lock", ".driver.json"
RENEW = 5.0  # seconds between two renewals of a lease
STALE = 30.0  # seconds after which nobody can still be renewing it
SETTLE = 2.0  # seconds after which two that took over at once have both written
POLL = 0.5  # seconds between two looks


@dataclass(frozen=True)
class Hold:
    """What a driver holds. `lost` is set once somebody else has taken a lease over, as after a long sleep."""

    folder: str
    lost: Event = field(default_factory=Event)


@contextmanager
def hold(folder: str, what: str = "driver") -> Iterator[Hold]:
    """Holds a folder for the length of a block; makes it if it is not there, so ask once input has been checked.

    Args:
        folder: local path or fsspec URL.
        what: who asks, for the message that others see.

    Raises:
        UserError: another holds it, which is named, or nothing can be written there. Where a lease is not given back,
            it takes up to `STALE` seconds to tell.
    """
    lock, mine = None if is_remote(folder) else _lock(folder), _about(what)
    with _leased(folder, mine) if lock is None else _locked(folder, mine, lock) as held:
        yield held


def _lock(folder: str) -> FileLock | None:
    """The kernel's lock on a local folder; None where its file system knows none."""
    _, path = filesystem_of(folder)
    try:
        os.makedirs(path, exist_ok=True)
        lock = FileLock(join(path, LOCK), timeout=0, fallback_to_soft=False)
        lock.acquire()
        return lock
    except Timeout as error:
        raise _taken(folder, _holder(folder)) from error
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            return None
        raise UserError(f"cannot write {join(folder, LOCK)}: {reason(error)}") from error


@contextmanager
def _locked(folder: str, mine: dict, lock: FileLock) -> Iterator[Hold]:
    """The note beside the lock is for people: who holds it."""
    try:
        _write(folder, mine)
        yield Hold(folder)
    finally:
        with suppress(UserError, OSError):
            remove(join(folder, NOTE))
        lock.release()


@contextmanager
def _leased(folder: str, mine: dict) -> Iterator[Hold]:
    held, done = Hold(folder), Event()
    _acquire(folder, mine)
    renewing = Thread(target=_renew, args=(held, mine, done), daemon=True, name="patchrank-lease")
    renewing.start()
    try:
        yield held
    finally:
        done.set()
        renewing.join(timeout=RENEW)
        with suppress(UserError, OSError):  # nobody renews it from here on, so it goes stale at the worst
            if _holder(folder).get("token") == mine["token"]:
                remove(join(folder, NOTE))


def _acquire(folder: str, mine: dict) -> None:
    """Writes a lease where there is none, or in the place of one that is not renewed."""
    for _ in range(3):  # one may be given back while we look at it
        if _create(folder, mine):
            return
        theirs = _holder(folder)
        if not theirs and not exists(join(folder, NOTE)):
            continue
        found = theirs if _is_gone(theirs) else _watched(folder, theirs)
        if found == theirs:
            return _take_over(folder, theirs, mine)
        if found:
            raise _taken(folder, found)
    raise _taken(folder, {})


def _create(folder: str, mine: dict) -> bool:
    """Whether a lease could be written where there was none."""
    with suppress(FileExistsError):
        _write(folder, mine, mode="create")
        return True
    return _holder(folder).get("token") == mine["token"]  # written, but the store's answer was lost


def _watched(folder: str, theirs: dict) -> dict:
    """The lease that stands there as soon as it is another one, or the same when it has gone stale meanwhile."""
    started, told = time.monotonic(), False
    while (waited := time.monotonic() - started) < STALE:
        time.sleep(POLL)
        if (found := _holder(folder)) != theirs:
            return found
        if waited > 2 * RENEW and not told:
            told = True
            print(f"{folder}: held by {_who(theirs)}; waiting {STALE:.0f} s for a sign of life", file=sys.stderr)
    return theirs


def _take_over(folder: str, theirs: dict, mine: dict) -> None:
    print(f"{folder}: taking over from {_who(theirs)}, which is gone", file=sys.stderr)
    _write(folder, mine)
    time.sleep(SETTLE)  # whoever else took over has written by now, and the last one has it
    if (found := _holder(folder)).get("token") != mine["token"]:
        raise _taken(folder, found)


def _renew(held: Hold, mine: dict, done: Event) -> None:
    while not done.wait(RENEW):
        with suppress(UserError, OSError):  # a store that fails now may take it next time
            if _holder(held.folder).get("token") not in (mine["token"], None):
                print(f"{held.folder}: another driver has taken it over; this one should stop", file=sys.stderr)
                held.lost.set()
                return
            _write(held.folder, mine | {"renewed": time.time()}, patience=RENEW)


def _write(folder: str, about: dict, patience: float | None = None, mode: str = "overwrite") -> None:
    path = join(folder, NOTE)
    filesystem, name = filesystem_of(path)
    content = (json.dumps(about, indent=1) + "\n").encode()
    if not is_remote(path):
        return _write_local(path, name, content, mode)
    patiently(path, lambda: put(filesystem, name, content, mode=mode), "write", patience)


def _write_local(path: str, name: str, content: bytes, mode: str) -> None:
    if mode != "create":
        return write_atomic(path, content)
    with open(name, "xb") as file:
        file.write(content)


def _holder(folder: str) -> dict:
    found = read_json(join(folder, NOTE))
    return found if isinstance(found, dict) else {}


def _about(what: str) -> dict:
    here = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"what": what, **here, "since": since, "token": uuid.uuid4().hex, "renewed": time.time()}


def _machine() -> str:
    """Where a process id means the same process: hosts and containers may share a name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{uuid.getnode()}"


def _is_gone(theirs: dict) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    if theirs.get("machine") != _machine() or not isinstance(theirs.get("pid"), int) or os.name != "posix":
        return False
    try:
        os.kill(theirs["pid"], 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _who(theirs: dict) -> str:
    known = [f"{key} {theirs[key]}" for key in ("pid", "host", "since") if key in theirs]
    return f"{theirs.get('what', 'another driver')} ({', '.join(known) or 'which left no note'})"


def _taken(folder: str, theirs: dict) -> UserError:
    return UserError(
        f"{folder}: held by {_who(theirs)}, and one driver at a time may work on a folder; wait until it ends, stop "
        "it, or name another folder"
    )
