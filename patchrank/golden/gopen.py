"""What WebDataset opens URLs by: fsspec in place of shell commands, and no shard that is not what its record says.

    import webdataset
    from patchrank.data.gopen import register_gopen

    register_gopen()
    shards = webdataset.WebDataset("s3://bucket/shards/<key>/shard-{000000..000003}.tar", shardshuffle=False)

WebDataset reads a truncated tar without a word. Our shards have their size and sha256 beside them, and are checked
by these before a byte is handed out, however the store behaves meanwhile. Local paths are opened by WebDataset
itself, unchecked: `patchrank.golden.shards.stream` checks those too.
"""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from typing import IO

from patchrank.io import filesystem_of, patiently, read_bytes, read_json
from patchrank.utils.errors import UserError

SCHEMES = ("s3", "s3a", "gs", "gcs", "abfs", "az", "memory")
MISSING = "missing"


def register_gopen(*schemes: str) -> None:
    """Has WebDataset open URLs of these schemes by `gopen`, in this process; `SCHEMES` where none are named.

    Handlers that WebDataset brings for them, which run commands in a shell, are replaced. Workers of a `DataLoader`
    know of it where they are forked; where they are spawned, it is their `worker_init_fn` to call this.
    """
    from webdataset import gopen_schemes

    for scheme in schemes or SCHEMES:
        gopen_schemes[scheme] = gopen


def gopen(url: str, mode: str = "rb", bufsize: int = 8192, **options: object) -> IO[bytes]:
    """A URL as a stream: a whole, checked shard where its record lies beside it, else as fsspec opens it.

    Raises:
        UserError: a shard that is missing, truncated or changed; a store that fails; a kind of URL that is refused.
    """
    if mode == "rb" and (record := _record(url)) is not None:
        return open_shard(url, record)
    filesystem, name = filesystem_of(url)
    return patiently(url, lambda: filesystem.open(name, mode), "read" if mode == "rb" else "write")


def open_shard(url: str, record: dict) -> IO[bytes]:
    """The bytes of a shard, which are what its record says. Raises `UserError` that names a shard of other bytes."""
    content, fault = check_shard(url, record)
    if fault:
        raise UserError(f"shard {url} is {fault}; the golden stage makes that one again")
    return io.BytesIO(content)


def check_shard(url: str, record: dict) -> tuple[bytes, str | None]:
    """The bytes of a shard, and what is wrong with them (None where nothing is)."""
    try:
        content = read_bytes(url)
    except FileNotFoundError:
        return b"", MISSING
    if len(content) != record["bytes"]:
        return b"", _truncated(len(content), record["bytes"])
    if sha256(content) != record["sha256"]:
        return b"", "changed: its sha256 is not the recorded one"
    return content, None


def shard_fault(url: str, record: dict) -> str | None:
    """What is wrong with a shard; a process reads its bytes once for each version of the file that it meets."""
    filesystem, name = filesystem_of(url)
    try:
        about = patiently(url, lambda: filesystem.info(name))
    except FileNotFoundError:
        return MISSING
    if about["size"] != record["bytes"]:
        return _truncated(about["size"], record["bytes"])
    return _fault_of(url, str(about), record["bytes"], record["sha256"])


@lru_cache(maxsize=1 << 16)
def _fault_of(url: str, version: str, size: int, digest: str) -> str | None:
    return check_shard(url, {"bytes": size, "sha256": digest})[1]


def _truncated(found: int, size: int) -> str:
    return f"truncated: {found} of {size} bytes"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _record(url: str) -> dict | None:
    """What lies beside a tar of ours; None beside other files."""
    stem, dot, extension = url.rpartition(".")
    record = read_json(f"{stem}.json") if dot and extension == "tar" else None
    ours = isinstance(record, dict) and record.get("file") == url.rsplit("/", 1)[-1]
    return record if ours and {"bytes", "sha256"} <= record.keys() else None
