"""Images that decode: a few broken files are left out and told of, many stop the run."""

from __future__ import annotations

import errno
import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from patchrank.data.decoding import fault
from patchrank.data.image_split import THREADS, ImageSplit, UnreadError
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress

CHUNK = 1024  # images whose verdicts are awaited at once
SHOWN = 20  # broken images that are told of one by one
SAMPLED = 64  # images whose bytes stand for all of a named dataset

# What says that a path leads to no file, today and tomorrow.
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_NO_PATH = (errno.ELOOP, errno.ENAMETOOLONG)


def sound(split: ImageSplit, limit: int | None = None, share: float = 0.01) -> ImageSplit:
    """The first `limit` images of a split that decode in full (all where it is None), in order.

    Each broken one is named on stderr and counted in `skipped`. One may always be broken; more may be as long as they
    are no more than `share` of those looked at, and with a share of 0 none. Only as many are looked at as it takes.
    `version` becomes a digest of the files' bytes, since other folders may hold other images by the same names.

    Raises:
        UserError: more are broken than may be, or none is left; or something hides a file for now, as a network does
            that fails: leaving such an image out would make the result depend on the day.
    """
    wanted = len(split) if limit is None else min(limit, len(split))
    good, broken, contents = [], {}, hashlib.sha256(str(split.version).encode())
    for i, reason, digest in _verdicts(split, wanted):
        if reason is None:
            good.append(i)
            contents.update(digest)
        else:
            broken[i] = reason
        if i + 1 >= wanted and _too_many(broken, i + 1, share):
            break
    _tell(split, broken)
    looked = len(good) + len(broken)
    if _too_many(broken, looked, share) or (broken and not good):
        raise UserError(_refusal(split, broken, looked, share))
    return replace(split.take(good), skipped=split.skipped + len(broken), version=_number(contents.digest()))


def fingerprinted(split: ImageSplit) -> ImageSplit:
    """The split with a digest of the bytes of at most 64 images, evenly spaced, in its `version`.

    A copy of a dataset in another size or compression has other bytes everywhere, so that a few tell it.

    Raises:
        UserError: one of them cannot be read.
    """
    count = min(SAMPLED, len(split))
    places = [n * (len(split) - 1) // max(1, count - 1) for n in range(count)]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda i: hashlib.sha256(split.content(i)).digest(), places)
        contents = hashlib.sha256(str(split.version).encode() + b"".join(digests))
    return replace(split, version=_number(contents.digest()))


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:6], "big")


def _verdicts(split: ImageSplit, wanted: int) -> Iterator[tuple[int, str | None, bytes]]:
    """Place, fault and digest of each image, in order, until as many as are wanted have no fault."""
    looked = found = 0
    bar = progress(total=wanted, desc=f"check {split.task}/{split.split}", unit="image", delay=2)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        while found < wanted and looked < len(split):
            places = range(looked, min(looked + wanted - found, looked + CHUNK, len(split)))
            for i, (reason, digest) in zip(places, pool.map(lambda i: _verdict(split, i), places)):
                found += reason is None
                bar.update(reason is None)
                yield i, reason, digest
            looked = places.stop


def _verdict(split: ImageSplit, i: int) -> tuple[str | None, bytes]:
    try:
        content = split.content(i)
    except UnreadError as error:
        cause = error.__cause__
        if isinstance(cause, _ABSENT) or getattr(cause, "errno", None) in _NO_PATH:
            return f"cannot be read ({cause.strerror or 'no such file'})", b""
        raise UserError(f"{error}; it does not count as broken, since it may be read another time") from error
    return fault(content, split.decoding), hashlib.sha256(content).digest()


def _too_many(broken: dict[int, str], looked: int, share: float) -> bool:
    return len(broken) > (max(1, share * looked) if share else 0)


def _tell(split: ImageSplit, broken: dict[int, str]) -> None:
    for i, reason in list(broken.items())[:SHOWN]:
        print(f"{split.task}/{split.split}: left out {split.ids[i]}: {reason}", file=sys.stderr)
    if len(broken) > SHOWN:
        print(f"{split.task}/{split.split}: left out {len(broken) - SHOWN} more", file=sys.stderr)


def _refusal(split: ImageSplit, broken: dict[int, str], looked: int, share: float) -> str:
    first, reason = next(iter(broken.items()))
    rule = f"one image, or {100 * share:g} % of those looked at, may be broken" if share else "none may be broken"
    rule = rule if looked > len(broken) else "at least one must be left"
    return (
        f"data {split.task}/{split.split}: {len(broken)} of {looked} images cannot be decoded, but {rule}; "
        f"the first is {split.ids[first]} ({reason})"
    )
