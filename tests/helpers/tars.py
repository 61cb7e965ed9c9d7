"""Small tars for tests of WebDataset's samples."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

KINDS = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "folder": tarfile.DIRTYPE, "pipe": tarfile.FIFOTYPE}


def tar_of(members: Iterable[tuple], form: int = tarfile.GNU_FORMAT) -> bytes:
    """The bytes of a tar of (name, content) in this order; (name, None, kind) is one of `KINDS`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content, *kind in members:
            about = tarfile.TarInfo(name)
            if kind:
                about.type, about.linkname = KINDS[kind[0]], "elsewhere"
                tar.addfile(about)
            else:
                content = content if isinstance(content, bytes) else content.encode()
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    return buffer.getvalue()
