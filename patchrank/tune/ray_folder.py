"""Where a Ray that is started here keeps its sessions: a folder whose path leaves room for the sockets in it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from patchrank.tune.console import say
from patchrank.utils.errors import UserError, one_line

LONGEST = 103 if sys.platform == "darwin" else 107  # bytes that the path of a Unix socket may have
SOCKET = "ray/session_2026-11-27_23-18-22_125718_4194304/sockets/plasma_store"  # one of Ray's, in the folder
SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # where a folder of our own may lie
ROOM = 2**20  # bytes that must be free: a session begins with that much of logs


@contextmanager
def ray_folder() -> Iterator[None]:
    """Sees to it that Ray finds a folder for its sessions, for the length of a block.

    Ray takes RAY_TMPDIR, then TMPDIR, then /tmp. Schedulers such as Slurm make a TMPDIR for each job that is often too
    long for a socket. A TMPDIR that will not do is replaced for Ray alone, by a short folder that only this user can
    read and that goes with the block. RAY_TMPDIR is what the user wants, and is never replaced.

    Raises:
        UserError: Ray could not work in RAY_TMPDIR, or nowhere at all.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    usual = os.environ.get(name, "/tmp")  # an empty value counts, as it does for Ray
    fault = fault_of(usual)
    if fault is None:
        yield
        return
    told = f"{name}={usual}: Ray cannot keep its session there ({fault})"
    short = next((place for place in SHORT if fault_of(place) is None), None)
    if name == "TMPDIR" and short is None:
        raise UserError(f"{told}, nor in {', '.join(SHORT)}; try RAY_TMPDIR=FOLDER, a short one that you can write to")
    if name == "RAY_TMPDIR":
        raise UserError(f"{told}; try a short folder that you can write to, such as RAY_TMPDIR={SHORT[0]}")
    with tempfile.TemporaryDirectory(prefix="ray-", dir=short, ignore_cleanup_errors=True) as folder:
        say(f"note: {told}; it lies in {folder}")
        os.environ["RAY_TMPDIR"] = folder
        try:
            yield
        finally:
            del os.environ["RAY_TMPDIR"]


def fault_of(folder: str) -> str | None:
    """Why Ray cannot keep its sessions in a folder, which is made if it is not there; None where it can."""
    length = len(os.fsencode(os.path.join(folder, SOCKET)))
    if length > LONGEST:
        return f"sockets in it would have paths of {length} bytes, and {LONGEST} are allowed"
    if not os.path.isabs(folder) or not folder.isascii():  # workers run elsewhere, and Ray's logs are ASCII
        return "its path must be absolute and ASCII"
    try:
        os.makedirs(os.path.join(folder, "ray"), exist_ok=True)  # as Ray does
        with tempfile.TemporaryFile(dir=os.path.join(folder, "ray")) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        return error.strerror or one_line(error)
    return None
