"""Whole files: read, written, listed and removed, on local paths and on stores that may fail for a while."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import TqdmCallback
from fsspec.implementations.local import LocalFileSystem

from patchrank.io.paths import cache_folder, filesystem_of, is_remote, join, protocols
from patchrank.io.retry import patiently, reason
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress

CHECK_PATIENCE = 10.0  # seconds: somebody is watching, and nothing has been computed yet
PUT_TIMEOUT = 30.0  # seconds for an empty file
PUT_SPEED = 2**20  # bytes that a store must take in one second more
_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"}  # s3fs would make a missing bucket


def read_bytes(path: str | Path) -> bytes:
    """The whole of a file. Raises `FileNotFoundError` where there is none, `StoreError` where a store fails."""
    filesystem, name = filesystem_of(path)
    return patiently(path, lambda: filesystem.cat_file(name))


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises `UserError` where it cannot be read."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or 'no such file'})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not a text file in UTF-8; try to save it in that encoding") from error


def read_json(path: str | Path) -> dict | None:
    """The object in a JSON file; None where there is no such file, or it is damaged and so to be made again."""
    try:
        found = json.loads(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def exists(path: str | Path, patience: float | None = None) -> bool:
    filesystem, name = filesystem_of(path)
    return patiently(path, lambda: filesystem.exists(name), patience=patience)


def list_names(folder: str | Path) -> list[str]:
    """Names of the files in a folder, sorted; none where there is no folder."""
    filesystem, name = filesystem_of(folder)
    filesystem.invalidate_cache(name)  # for file systems whose listings cache `filesystem_of` cannot switch off
    entries = patiently(folder, lambda: filesystem.ls(name, detail=False) if filesystem.isdir(name) else [])
    paths = (str(entry).rstrip("/") for entry in entries)
    return sorted(path.rsplit("/", 1)[-1] for path in paths if path != name.rstrip("/"))  # a store may list its folder


def remove(path: str | Path) -> None:
    """Removes a file if it is there."""
    filesystem, name = filesystem_of(path)
    with suppress(FileNotFoundError):
        patiently(path, lambda: filesystem.rm_file(name), "remove")


def local_copy(path: str | Path) -> str:
    """A local file of the same content: the file itself, or a copy of a remote one in `<cache>/fetched`.

    Each version of a remote file (by the size, time and ETag that its store tells) is fetched once.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the store fails, or the cache cannot be written to.
    """
    filesystem, name = filesystem_of(path)
    if isinstance(filesystem, LocalFileSystem):
        return name
    url, cache = str(path), cache_folder()
    if is_remote(cache):
        raise UserError(f"PATCHRANK_CACHE is {cache}, but {url} is fetched to a local folder first; try ~/.cache")
    version = patiently(url, lambda: filesystem.ukey(name))
    folder = join(cache, "fetched", hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:16])
    target = join(folder, posixpath.basename(name))
    if not os.path.exists(target):
        shown = {"desc": f"fetch {posixpath.basename(name)}", "unit": "byte", "unit_scale": True, "delay": 2}
        try:
            os.makedirs(folder, exist_ok=True)
            with _replacing(target) as temporary:  # fsspec's filecache would show other processes half of a file
                bar = TqdmCallback(shown, tqdm_cls=progress)
                patiently(url, lambda: filesystem.get_file(name, temporary, callback=bar))
        except FileNotFoundError:  # it went away meanwhile
            raise
        except OSError as error:
            raise UserError(f"cannot write {folder}: {reason(error)}") from error
    return target


def write_atomic(path: str | Path, content: bytes | str, patience: float | None = None) -> None:
    """Writes a whole file or nothing: beside its place and then renamed; on object stores in one put.

    Args:
        patience: seconds that a store is waited for, as in `patiently`.

    Raises:
        UserError: the place cannot be written to.
    """
    filesystem, name = filesystem_of(path)
    content = content.encode() if isinstance(content, str) else content

    def write() -> None:
        if not _WITHOUT_FOLDERS & protocols(filesystem):
            filesystem.makedirs(posixpath.dirname(name) or ".", exist_ok=True)
        if not isinstance(filesystem, LocalFileSystem):
            put(filesystem, name, content)
            return
        if os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name):
            with open(name, "wb") as file:  # /dev/null, /dev/stdout, a pipe: a file must not take its place
                file.write(content)
            return
        with _replacing(os.path.realpath(name)) as temporary, open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    try:
        patiently(path, write, "write", patience)
    except (OSError, RecursionError) as error:  # the latter where a path has hundreds of folders
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def write_json(path: str | Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def check_reachable(folder: str | Path) -> None:
    """Raises `UserError` within about `CHECK_PATIENCE` seconds for a store that does not answer."""
    exists(folder, CHECK_PATIENCE)


def check_writable(folder: str | Path) -> None:
    """Raises `UserError` if nothing can be written into a folder. Files and folders are then as they were before."""
    probe = join(folder, ".writable")
    filesystem, name = filesystem_of(folder)
    local = isinstance(filesystem, LocalFileSystem)
    absent = [path for path in (Path(name), *Path(name).parents) if not path.exists()] if local else []
    try:
        write_atomic(probe, b"", CHECK_PATIENCE)
        remove(probe)
    finally:
        for path in absent:
            with suppress(OSError):
                path.rmdir()


def put(filesystem: AbstractFileSystem, name: str, content: bytes, **how: str) -> None:
    """Writes a remote file in one call; `mode="create"` raises `FileExistsError` where there is one."""
    limit = {}
    if isinstance(filesystem, AsyncFileSystem):  # botocore would wait without limit for the server's "continue"
        limit["timeout"] = PUT_TIMEOUT + len(content) / PUT_SPEED
    filesystem.pipe_file(name, content, **how, **limit)


@contextmanager
def _replacing(name: str) -> Iterator[str]:
    """A temporary file beside a local one, which takes that one's place if the block ends without an error."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(name), prefix=".writing-")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, name)
    except BaseException:
        os.unlink(temporary)
        raise
