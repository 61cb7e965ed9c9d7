"""Images that a CSV file lists."""

from __future__ import annotations

import csv
import io
import posixpath
from functools import partial

from fsspec import AbstractFileSystem

from patchrank.data.readers.entries import Entry, Listing, read_part
from patchrank.io import read_bytes, read_text
from patchrank.utils.errors import UserError, near

COLUMNS = ("path", "label", "caption", "split", "group")


def read_csv(filesystem: AbstractFileSystem, folder: str, root: str) -> Listing:
    """What a CSV file lists; `folder` is its own, which paths start from.

    Raises:
        UserError: no column `path`, a row with too few or too many cells, or a file that is no CSV.
    """
    text = read_text(root)
    if not text.strip():
        raise UserError(f"{root}: the file is empty, but must list images below a header with the column 'path'")
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows.fieldnames = columns = [column.strip().lower() for column in rows.fieldnames or ()]
        if not any(columns):
            raise UserError(f"{root}, line 1: is empty, but must be a header with the column 'path'")
        if "path" not in columns:
            raise UserError(f"{root}, line 1: column 'path' is missing; {near('path', columns)}")
        for name in COLUMNS:
            if columns.count(name) > 1:
                raise UserError(f"{root}, line 1: column {name!r} stands twice")
        return Listing([_row(filesystem, folder, row, f"{root}, line {rows.line_num}") for row in rows])
    except csv.Error as error:
        raise UserError(f"{root}, line {rows.reader.line_num}: not readable as CSV ({error})") from error


def _row(filesystem: AbstractFileSystem, folder: str, row: dict[str | None, str | None], where: str) -> Entry:
    if None in row:
        raise UserError(f"{where}: has more cells than the header has columns")
    path, label, caption, split, group = ((row.get(name) or "").strip() or None for name in COLUMNS)
    for name, value in (("path", path), ("split", split), ("group", group)):
        if name in row and value is None:
            raise UserError(f"{where}, column {name!r}: is empty, but must be filled in every row")
    if "\0" in path:
        raise UserError(f"{where}, column 'path': holds a NUL character, which no path may")
    if "://" in path:
        return Entry(path, where, partial(read_bytes, path), label, caption, split, group)
    path = posixpath.normpath(path)
    read = partial(read_part, filesystem, posixpath.join(folder, path))
    return Entry(path, where, read, label, caption, split, group)
