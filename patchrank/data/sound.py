"""Images that decode: a few broken files are left out and told of, many stop the run."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from tqdm import tqdm

from patchrank.data.decoding import fault
from patchrank.data.images import ImageSplit
from patchrank.errors import UserError

CHUNK = 1024  # images whose verdicts are awaited at once
SHOWN = 20  # broken images that are told of one by one


def sound(split: ImageSplit, limit: int | None = None, share: float = 0.01) -> ImageSplit:
    """The first `limit` images of a split that decode in full (all where it is None), in order.

    Each broken one is named on stderr and counted in `skipped`. One may always be broken; more may be as long as they
    are no more than `share` of those looked at, and with a share of 0 none. Only as many are looked at as it takes.
    `version` becomes a digest of the files' bytes, since other folders may hold other images by the same names.

    What merely hides a file for now, as a network does that fails, is raised as it comes: leaving such images out
    would make the result depend on the day.

    Raises:
        UserError: more are broken than may be, or none is left.
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
    version = int.from_bytes(contents.digest()[:6], "big")
    return replace(split.take(good), skipped=split.skipped + len(broken), version=version)


def _verdicts(split: ImageSplit, wanted: int) -> Iterator[tuple[int, str | None, bytes]]:
    """Place, fault and digest of each image, in order, until as many as are wanted have no fault."""
    looked = found = 0
    bar = tqdm(total=wanted, desc=f"check {split.task}/{split.split}", unit="image", delay=2)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:
        while found < wanted and looked < len(split):
            places = range(looked, min(looked + wanted - found, looked + CHUNK, len(split)))
            for i, (reason, digest) in zip(places, pool.map(lambda i: _verdict(split, i), places)):
                found += reason is None
                bar.update(reason is None)
                yield i, reason, digest
            looked = places.stop


def _verdict(split: ImageSplit, i: int) -> tuple[str | None, bytes]:
    try:
        content = split.read(i)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        return f"cannot be read ({error.strerror or 'no such file'})", b""
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
