"""Golden-rank shards: tars of images with their scores, and a manifest of them; none is ever half-written.

WebDataset reads a truncated tar as a short one, so each shard has its size and sha256 beside it, and every reader
checks these first. webdataset is imported when shards are read or written.

    <root>/<key>/shard-000000.tar    images (original bytes), labels, ids, scores and window damages
    <root>/<key>/shard-000000.json   samples, bytes and sha256 of that tar
    <root>/<key>/manifest.json       written last: what was scored, with what, and the list of shards
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

import numpy as np

from patchrank.data.decoding import DECODERS, extension_of
from patchrank.io import content_id, filesystem_of, join, patiently, read_bytes, read_json, write_atomic, write_json
from patchrank.utils.errors import UserError

SHARD_SIZE = 64
SCHEMES = ("s3", "s3a", "gs", "gcs", "abfs", "az", "memory")  # kinds of URLs of shards in your own WebDataset
_NOT_IMAGES = ("__key__", "__url__", "__local_path__", "json", "cls", "scores.npy", "windows.npy")


@dataclass(frozen=True)
class Sample:
    """One image of a shard: scores (metrics, N) are importance g, windows (metrics, W) raw damage."""

    id: str
    content: bytes
    label: int | None
    scores: np.ndarray
    windows: np.ndarray
    decoding: str = "plain"

    def image(self):
        return DECODERS[self.decoding](self.content)


class ShardFolder:
    """One set of shards, complete or in the making; `header` decides on its contents, and so on its name."""

    def __init__(self, root: str, header: dict):
        self.header = header
        self.key = content_id(header)[:16]
        self.path = join(root, self.key)

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard."""
        count, size = self.header["data"]["count"], self.header["shard_size"]
        return [min(size, count - start) for start in range(0, count, size)]

    def complete(self) -> bool:
        """Whether every shard is there and undamaged, and the manifest says of each what its own record says."""
        manifest = read_json(join(self.path, "manifest.json"))
        return manifest is not None and manifest.get("shards") == self._records() and not self.faults()

    def faults(self) -> dict[int, str]:
        """What is wrong with each shard that is not as it should be: `{1: "truncated: 512 of 3072 bytes"}`."""
        return {index: fault for index in range(len(self.sizes)) if (fault := self.fault(index))}

    def fault(self, index: int) -> str | None:
        """What is wrong with one shard; None where nothing is. Each version of its file is read once per process."""
        record = self.record(index)
        if record is None or record.get("samples") != self.sizes[index]:
            return "not made yet"
        url = join(self.path, record["file"])
        filesystem, name = filesystem_of(url)
        try:
            about = patiently(url, lambda: filesystem.info(name))
        except FileNotFoundError:
            return "missing"
        return _fault_of_version(url, str(about), record["bytes"], record["sha256"])

    def write(self, index: int, samples: Iterable[Sample]) -> None:
        """Writes shard number `index` and its record, each whole or not at all; equal samples give equal bytes."""
        from webdataset.writer import TarWriter

        buffer, count, first = io.BytesIO(), 0, index * self.header["shard_size"]
        with TarWriter(buffer, encoder=True, mtime=0) as tar:
            for count, sample in enumerate(samples, 1):
                member = {"__key__": f"{first + count - 1:08d}", extension_of(sample.content): sample.content}
                member |= {} if sample.label is None else {"cls": sample.label}
                member |= {"json": {"id": sample.id}, "scores.npy": sample.scores, "windows.npy": sample.windows}
                tar.write(member)
        content, name = buffer.getvalue(), f"{_stem(index)}.tar"
        digest = hashlib.sha256(content).hexdigest()
        record = {"file": name, "samples": count, "bytes": len(content), "sha256": digest}
        write_atomic(join(self.path, name), content)
        write_json(join(self.path, f"{_stem(index)}.json"), record)

    def finish(self, **how: object) -> dict:
        """Compiles the manifest from the records of all shards.

        `how` (batch, threads, passed_over) is noted where it is not empty, but not keyed.
        """
        if self.faults():
            raise UserError(f"shards {self.path}: some are missing or damaged, so no manifest can be written")
        noted = {name: value for name, value in how.items() if value}
        manifest = {**self.header, "key": self.key, **noted, "shards": self._records(), "complete": True}
        write_json(join(self.path, "manifest.json"), manifest)
        return manifest

    def _records(self) -> list[dict | None]:
        return [self.record(index) for index in range(len(self.sizes))]

    def record(self, index: int) -> dict | None:
        """What one shard's record says: its file, samples, bytes and sha256; None where there is none."""
        return read_json(join(self.path, f"{_stem(index)}.json"))


def read_manifest(path: str) -> dict:
    """The manifest of a folder of shards. Raises `UserError` where there is none or scoring did not finish."""
    manifest = read_json(join(path, "manifest.json"))
    if manifest is None:
        raise UserError(f"shards {path}: no manifest.json, so scoring has not finished; run the golden stage again")
    if manifest.get("schema") != 1:
        raise UserError(f"shards {path}: schema is {manifest.get('schema')}, but this version reads 1")
    return manifest


def stream(path: str) -> Iterator[Sample]:
    """All samples of a folder in order, one verified shard in memory at a time.

    Raises:
        UserError: a shard is missing, truncated or changed; it is named.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    manifest = read_manifest(path)
    decoding = manifest["data"].get("decoding", "plain")
    urls = [join(path, each["file"]) for each in manifest["shards"]]
    opened = ({"url": url, "stream": open_shard(url, each)} for url, each in zip(urls, manifest["shards"]))
    for member in group_by_keys(tar_file_expander(opened)):
        content = member[next(key for key in member if key not in _NOT_IMAGES)]
        label = int(member["cls"]) if "cls" in member else None
        arrays = (np.load(io.BytesIO(member[key]), allow_pickle=False) for key in ("scores.npy", "windows.npy"))
        yield Sample(json.loads(member["json"])["id"], content, label, *arrays, decoding)


def register_gopen(*schemes: str) -> None:
    """Makes WebDataset open URLs of these schemes (`SCHEMES` if left out) by fsspec, and check shards of ours first.

        register_gopen()
        shards = webdataset.WebDataset("s3://bucket/shards/<key>/shard-{000000..000003}.tar", shardshuffle=False)

    It replaces WebDataset's own handlers, which run shell commands. Workers of a `DataLoader` that are spawned must
    call it in their `worker_init_fn`. WebDataset opens local paths itself, unchecked; `stream` checks those too.
    """
    from webdataset import gopen_schemes

    gopen_schemes.update(dict.fromkeys(schemes or SCHEMES, gopen))


def gopen(url: str, mode: str = "rb", bufsize: int = 8192, **options: object) -> IO[bytes]:
    """A URL as a stream: a checked shard if its record lies beside it, else the file as fsspec opens it.

    Raises:
        UserError: a shard that is missing, truncated or changed; a store that fails; a kind of URL that is refused.
    """
    record = read_json(f"{url.removesuffix('.tar')}.json") if mode == "rb" and url.endswith(".tar") else None
    if isinstance(record, dict) and {"file", "bytes", "sha256"} <= record.keys():
        return open_shard(url, record)
    filesystem, name = filesystem_of(url)
    return patiently(url, lambda: filesystem.open(name, mode), "read" if mode == "rb" else "write")


def open_shard(url: str, record: dict) -> IO[bytes]:
    """The bytes of a shard. Raises `UserError` that names the shard if they are not those of its record."""
    content, fault = _checked(url, record["bytes"], record["sha256"])
    if fault:
        raise UserError(f"shard {url} is {fault}; the golden stage makes that one again")
    return io.BytesIO(content)


def _checked(url: str, size: int, sha256: str) -> tuple[bytes, str | None]:
    """The bytes of a shard, and what is wrong with them; None where nothing is."""
    try:
        content = read_bytes(url)
    except FileNotFoundError:
        return b"", "missing"
    if len(content) != size:
        return content, f"truncated: {len(content)} of {size} bytes"
    changed = hashlib.sha256(content).hexdigest() != sha256
    return content, "changed: its sha256 is not the recorded one" if changed else None


@lru_cache(maxsize=1 << 16)
def _fault_of_version(url: str, version: str, size: int, sha256: str) -> str | None:
    return _checked(url, size, sha256)[1]


def _stem(index: int) -> str:
    return f"shard-{index:06d}"
