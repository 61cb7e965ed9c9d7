"""Images that cannot be decoded: a few are left out and named on stderr, many stop the run."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from patchrank.data.decoding import fault
from patchrank.data.image_split import THREADS, ImageSplit, UnreadError
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress, write_once

CHUNK = 1024  # images that are checked at once
SHOWN = 20  # broken images that are named
SAMPLED = 64  # images whose bytes stand for all of a named dataset

# Errors which say that there is no file, rather than that it cannot be read for now.
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_NO_PATH = (errno.ELOOP, errno.ENAMETOOLONG)


def without_broken(split: ImageSplit, limit: int | None = None, share: float = 0.01) -> ImageSplit:
    """The first `limit` images of a split (all where it is None) that decode in full, in order.

    Each broken image is named on stderr and counted in `skipped`. Images beyond those that are needed are not read.
    `version` becomes a digest of the files' bytes, since other folders may have other images of the same names.

    Args:
        share: of the images read, how many may be broken; one always may, unless `share` is 0.

    Raises:
        UserError: more images are broken, or none is left; or an image cannot be read for now, as when a network fails:
            without it, the result would depend on the day.
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
    name = f"{split.task}/{split.split}"
    for i, reason in list(broken.items())[:SHOWN]:
        write_once(f"{name}: left out {split.ids[i]}: {reason}")
    if len(broken) > SHOWN:
        write_once(f"{name}: left out {len(broken) - SHOWN} more")
    looked = len(good) + len(broken)
    if _too_many(broken, looked, share) or (broken and not good):
        rule = f"one image, or {100 * share:g} % of those looked at, may be broken" if share else "none may be broken"
        first, reason = next(iter(broken.items()))
        raise UserError(
            f"data {name}: {len(broken)} of {looked} images cannot be decoded, but "
            f"{rule if good else 'at least one must be left'}; the first is {split.ids[first]} ({reason}); try to "
            "repair or remove them"
        )
    version = int.from_bytes(contents.digest()[:6], "big")
    return replace(split.take(good), skipped=split.skipped + len(broken), version=version)


def fingerprinted(split: ImageSplit) -> ImageSplit:
    """The split, whose `version` becomes a digest of the bytes of at most 64 images, evenly spaced.

    A copy of a dataset in another size or compression differs in every image, so a few are enough.

    Raises:
        UserError: one of them cannot be read.
    """
    count = min(SAMPLED, len(split))
    places = [n * (len(split) - 1) // max(1, count - 1) for n in range(count)]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda i: hashlib.sha256(split.content(i)).digest(), places)
        contents = hashlib.sha256(str(split.version).encode() + b"".join(digests))
    return replace(split, version=int.from_bytes(contents.digest()[:6], "big"))


def _verdicts(split: ImageSplit, wanted: int) -> Iterator[tuple[int, str | None, bytes]]:
    """Index, fault and digest of each image, in order, until as many as are wanted have no fault."""
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
        raise UserError(f"{error}; it is not left out as broken, since it may be readable later") from error
    return fault(content, split.decoding), hashlib.sha256(content).digest()


def _too_many(broken: dict[int, str], looked: int, share: float) -> bool:
    allowed = max(1, share * looked) if share else 0
    return len(broken) > allowed
