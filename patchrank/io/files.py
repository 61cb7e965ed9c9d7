"""Whole files: read, written, listed and removed, on local paths and on stores that may fail for a while."""

from __future__ import annotations

import json
import os
import posixpath
import tempfile
from contextlib import suppress
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from patchrank.io.paths import filesystem_of, join, protocols
from patchrank.io.retry import patiently, reason
from patchrank.utils.errors import UserError

CHECK_PATIENCE = 10.0  # seconds: somebody is watching, and nothing has been computed yet
PUT_TIMEOUT, SLOW = 30.0, 2**20  # seconds for a file of no size, and bytes that are sent in one more
_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"}  # s3fs would make a missing bucket


def read_bytes(path: str | Path) -> bytes:
    """The whole of a file. Raises `FileNotFoundError` where there is none, `StoreError` where a store fails."""
    filesystem, name = filesystem_of(path)
    return patiently(path, lambda: filesystem.cat_file(name))


def read_json(path: str | Path) -> dict | None:
    """What a JSON file says; None where there is no such file or it is damaged (it will be made again)."""
    try:
        return json.loads(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def exists(path: str | Path) -> bool:
    filesystem, name = filesystem_of(path)
    return patiently(path, lambda: filesystem.exists(name))


def list_names(folder: str | Path) -> list[str]:
    """Names of the files in a folder, sorted; none where there is no folder."""
    filesystem, name = filesystem_of(folder)
    filesystem.invalidate_cache(name)  # for file systems that we know no switch of
    entries = patiently(folder, lambda: filesystem.ls(name, detail=False) if filesystem.isdir(name) else [])
    paths = (str(entry).rstrip("/") for entry in entries)
    return sorted(path.rsplit("/", 1)[-1] for path in paths if path != name.rstrip("/"))  # a store may list its folder


def remove(path: str | Path) -> None:
    """Removes a file if it is there."""
    filesystem, name = filesystem_of(path)
    with suppress(FileNotFoundError):
        patiently(path, lambda: filesystem.rm_file(name), "remove")


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a whole file or nothing: beside its place and then renamed; on object stores in one put.

    Raises:
        UserError: the place cannot be written to.
    """
    _write(path, content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def check_reachable(folder: str | Path) -> None:
    """Raises `UserError` for a store that does not answer, soon: somebody is waiting. Local paths always do."""
    filesystem, name = filesystem_of(folder)
    patiently(folder, lambda: filesystem.exists(name), patience=CHECK_PATIENCE)


def check_writable(folder: str | Path) -> None:
    """Raises `UserError` if nothing can be written into a folder; leaves no trace of having tried."""
    probe = join(folder, ".writable")
    filesystem, name = filesystem_of(folder)
    local = isinstance(filesystem, LocalFileSystem)
    absent = [path for path in (Path(name), *Path(name).parents) if not path.exists()] if local else []
    try:
        _write(probe, b"", CHECK_PATIENCE)
        remove(probe)
    finally:
        for path in absent:
            with suppress(OSError):
                path.rmdir()


def put(filesystem: AbstractFileSystem, name: str, content: bytes, **how: str) -> None:
    """Writes a remote file in one call; `mode="create"` raises `FileExistsError` where there is one.

    botocore sends no byte before the server says "continue", and sets no limit to waiting for that.
    """
    limit = {"timeout": PUT_TIMEOUT + len(content) / SLOW} if isinstance(filesystem, AsyncFileSystem) else {}
    filesystem.pipe_file(name, content, **how, **limit)


def _write(path: str | Path, content: bytes, patience: float | None = None) -> None:
    filesystem, name = filesystem_of(path)
    local = isinstance(filesystem, LocalFileSystem)

    def write() -> None:
        if not _WITHOUT_FOLDERS & protocols(filesystem):
            filesystem.makedirs(posixpath.dirname(name) or ".", exist_ok=True)
        (_replace if local else lambda *file: put(filesystem, *file))(name, content)

    try:
        patiently(path, write, "write", patience)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def _replace(name: str, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(name), prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, name)
    except BaseException:
        os.unlink(temporary)
        raise
