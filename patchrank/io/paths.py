"""Paths and fsspec URLs: made absolute, joined, opened. URLs that carry credentials are refused."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import fsspec
from fsspec.config import conf

from patchrank.utils.errors import UserError, one_line

LOCAL = ("file://", "local://")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # extras of our package, by protocol
# `patiently` tries again; botocore alone would wait for a silent server for 5 times 60 seconds.
_S3 = {"connect_timeout": 10, "read_timeout": 20, "retries": {"max_attempts": 0}}
_SECRET_BEFORE_HOST = re.compile(r"([\w+.-]+)://(?!arn:)(?![^/@:]*:\d+/)[^/@:]*:[^@]*@")
_SECRET_IN_QUERY = re.compile(r"[?&]([\w.-]*(?:key|keyid|secret|token|password|signature|sig|credential))=", re.I)


def resolve(path: str | Path, base: str | Path = ".") -> str:
    """An absolute path, or the URL as it is: relative paths would break inside Ray's workers.

    Raises:
        UserError: the URL carries credentials, or the path could never be one.
    """
    path = str(path)
    check_free_of_secrets(path)
    if "://" in path:
        return path
    try:
        found = (Path(base).resolve() / Path(path).expanduser()).resolve()
        if any(map(os.path.islink, (found, *found.parents))):  # Python 3.13 says nothing of a circle
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return str(found)
    except (OSError, RuntimeError, ValueError) as error:  # no such user, links in a circle, a NUL, no working directory
        raise UserError(f"path {path!r}: cannot be used ({one_line(error)})") from error


def join(root: str | Path, *parts: str) -> str:
    """`root/part/part`, for paths and URLs alike."""
    return "/".join([str(root).rstrip("/"), *parts])


def is_remote(path: str | Path) -> bool:
    """Whether a path lies on a store, which may fail for a while."""
    return "://" in str(path) and not str(path).startswith(LOCAL)


def cache_folder() -> str:
    """Where commands keep copies of remote files, and results that take long to compute: PATCHRANK_CACHE, or the
    user's cache."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.environ.get("PATCHRANK_CACHE") or resolve(join(user, "patchrank"))


def filesystem_of(path: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system of a path or URL, and the name in it; it keeps no listings.

    Endpoint and credentials come from the environment.

    Raises:
        UserError: a protocol that fsspec lacks, or whose package is missing; a shell's pipe; credentials in the URL.
    """
    url = str(path)
    check_free_of_secrets(url)
    _check_name(url)
    if url.startswith("pipe:"):
        raise UserError(f"{url}: pipe: would run a shell command, and is refused; give a path or a URL")
    try:
        filesystem, name = fsspec.core.url_to_fs(url, **_options(url))
    except ImportError as error:
        extra = EXTRAS.get(url.split("://")[0])
        hint = f"pip install 'patchrank-clip[{extra}]'" if extra else error
        raise UserError(f"{url}: the package for this kind of URL is missing; {hint}") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{url}: fsspec cannot open this kind of URL ({str(error).splitlines()[0]})") from error
    if "s3" in protocols(filesystem):
        filesystem.retries = 1  # s3fs would wait 5 times for a silent server
    return filesystem, name


def protocols(filesystem: fsspec.AbstractFileSystem) -> set[str]:
    """All protocols that a file system answers to, such as {"s3", "s3a"}."""
    return {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)


def check_free_of_secrets(url: str) -> None:
    """Refuses a URL that carries credentials, since URLs end up in files and logs.

    Raises:
        UserError: it does; the message does not repeat them.
    """
    before, query = _SECRET_BEFORE_HOST.search(url), _SECRET_IN_QUERY.search(url)
    if before or query:
        what = "before its host" if before else f"in {query[1]}="
        kind = before[1] if before else url.split("://")[0]
        raise UserError(
            f"{kind}://...: this URL carries credentials {what}, and would be written to records and logs; leave them "
            "out and set them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://)"
        )


def _check_name(path: str) -> None:
    """Raises `UserError` for a path that holds what the name of no file can hold."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UserError(f"path {path!r}: cannot be used (it holds a character that no name of a file can hold)")


def _options(url: str) -> dict[str, dict]:
    """Options for each protocol in a URL, those inside of chained URLs too."""
    # other processes write meanwhile, so a listing that was kept would be out of date
    kinds = [protocol for protocol in ("s3", "s3a", "gs", "gcs", "abfs", "az") if f"{protocol}://" in url]
    found = {protocol: {"use_listings_cache": False} for protocol in kinds}
    for protocol in {"s3", "s3a"} & found.keys():
        found[protocol]["config_kwargs"] = {**_S3, **conf.get(protocol, {}).get("config_kwargs", {})}
    return found
