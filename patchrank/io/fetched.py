"""Large remote files as local ones: fetched once to the user's cache, so that they can be mapped into memory."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.callbacks import TqdmCallback
from fsspec.implementations.local import LocalFileSystem

from patchrank.io.paths import filesystem_of, is_remote, join, resolve
from patchrank.io.retry import patiently
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress


def cache_folder() -> str:
    """Where commands keep what takes long to make and is filed by its content: PATCHRANK_CACHE, or the user's cache."""
    return os.environ.get("PATCHRANK_CACHE") or resolve(
        join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "patchrank")
    )


def local_copy(path: str | Path) -> str:
    """The local name of a file; a remote one is fetched to `<cache>/fetched`, whole, unless its version is there.

    A version is what the store says of the file: its size, time and ETag.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the store fails, or the cache cannot be written to.
    """
    filesystem, name = filesystem_of(path)
    if isinstance(filesystem, LocalFileSystem):
        return name
    url, cache = str(path), cache_folder()
    if is_remote(cache):
        raise UserError(f"PATCHRANK_CACHE is {cache}, but {url} is fetched to a local folder first; near: ~/.cache")
    version = patiently(url, lambda: filesystem.ukey(name))
    key = hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:16]
    target = join(cache, "fetched", key, name.rsplit("/", 1)[-1])
    if not os.path.exists(target):
        _fetch(filesystem, name, url, target)
    return target


def _fetch(filesystem: AbstractFileSystem, name: str, url: str, target: str) -> None:
    folder = os.path.dirname(target)
    try:
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".fetching-")
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        patiently(url, lambda: _get(filesystem, name, temporary))
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _get(filesystem: AbstractFileSystem, name: str, local: str) -> None:
    shown = {"desc": f"fetch {name.rsplit('/', 1)[-1]}", "unit": "byte", "unit_scale": True, "delay": 2}
    try:
        filesystem.get_file(name, local, callback=TqdmCallback(shown, tqdm_cls=progress))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # this machine's fault, not the store's
            raise UserError(f"cannot write {os.path.dirname(local)}: {error.strerror}") from error
        raise
