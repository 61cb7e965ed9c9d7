"""Images that a CSV file lists."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from fsspec import AbstractFileSystem

from patchrank.data.readers.entries import Entry, Listing, read_part
from patchrank.io import nfc, read_bytes, read_text, stored_name
from patchrank.utils.errors import UserError, near
from patchrank.utils.progress import write_once

COLUMNS = ("path", "label", "caption", "split", "group")
OPEN_CLIP = {"filepath": "path", "title": "caption"}  # what open_clip's training calls its two columns
DELIMITERS = ",;\t"  # Excel writes the second in much of Europe, open_clip reads the third
SHOWN = 8  # names of columns that are not read

Row = dict[str | None, str | list[str] | None]  # cells by their column; those beyond the last column by None


def read_csv(filesystem: AbstractFileSystem, folder: str, root: str) -> Listing:
    """What a CSV file lists; `folder` is its own, which paths start from.

    An image is a path. It stands in one row, or in several that differ in nothing but the caption, of which it then
    has them all. A row of empty cells is none. Columns that are not read are named on stderr, and images that no row
    names are not looked for.

    Raises:
        UserError: no column `path`, a row with too few or too many cells, rows of one image that say different things,
            or a file that is no CSV.
    """
    text = read_text(root)
    if not text.strip():
        raise UserError(f"{root}: the file is empty, but must list images below a header with the column 'path'")
    how = {"delimiter": _delimiter(text), "skipinitialspace": True, "strict": True}
    rows = csv.DictReader(io.StringIO(text, newline=""), **how)
    try:
        rows.fieldnames = _columns(rows.fieldnames or (), root)
        entries = []
        for row in rows:
            if any("".join(cells or "").strip() for cells in row.values()):
                entries.append(_entry(filesystem, folder, row, f"{root}, line {rows.line_num}"))
    except csv.Error as error:
        raise UserError(f"{root}, line {rows.reader.line_num}: not readable as CSV ({error})") from error
    return Listing(_one_an_image(entries))


def _delimiter(text: str) -> str:
    """The character between columns: the first of `DELIMITERS` by which the header has a column for paths."""
    header = text.partition("\n")[0].lower()
    for delimiter in DELIMITERS:
        columns = {cell.strip(' \t\r"') for cell in header.split(delimiter)}
        if columns & {"path", "filepath"}:
            return delimiter
    return DELIMITERS[0]


def _columns(header: Iterable[str], root: str) -> list[str]:
    """Names of the columns, as in `COLUMNS` where they are read."""
    columns = [column.strip().lower() for column in header]
    if not any(columns):
        raise UserError(f"{root}, line 1: is empty, but must be a header with the column 'path'")
    if "filepath" in columns and "path" not in columns:
        columns = [OPEN_CLIP.get(column, column) for column in columns]
    if "path" not in columns:
        rule = "the first line must name the columns, separated by commas, semicolons or tabs"
        raise UserError(f"{root}, line 1: column 'path' is missing; {near('path', columns)}; {rule}")
    for name in COLUMNS:
        if columns.count(name) > 1:
            raise UserError(f"{root}, line 1: column {name!r} stands twice")
    unread = [repr(column) for column in columns if column not in COLUMNS]
    if unread:
        more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
        known = ", ".join(COLUMNS)
        write_once(f"{root}: columns not read: {', '.join(unread[:SHOWN])}{more} (those that are read: {known})")
    return columns


def _entry(filesystem: AbstractFileSystem, folder: str, row: Row, where: str) -> Entry:
    if None in row:
        raise UserError(f"{where}: has more cells than the header has columns")
    path, label, caption, split, group = ((row.get(name) or "").strip() or None for name in COLUMNS)
    for name, value in (("path", path), ("split", split), ("group", group)):
        if name in row and value is None:
            raise UserError(f"{where}, column {name!r}: is empty, but must be filled in every row")
    label = label and nfc(label)
    if "\0" in path:
        raise UserError(f"{where}, column 'path': holds a NUL character, which no path may")
    captions = None if caption is None else (caption,)
    if "://" in path:
        return Entry(path, where, partial(read_bytes, path), label, captions, split, group)
    path = posixpath.normpath(path)
    return Entry(path, where, partial(_read, filesystem, folder, path), label, captions, split, group)


def _read(filesystem: AbstractFileSystem, folder: str, path: str) -> bytes:
    """The bytes of an image, also where the disk spells the accents in its path another way."""
    try:
        return read_part(filesystem, posixpath.join(folder, path))
    except FileNotFoundError:
        place, below = ("/", path[1:]) if path.startswith("/") else (folder, path)
        found = stored_name(filesystem.unstrip_protocol(place), below)
        if found == below:
            raise
        return read_part(filesystem, posixpath.join(place, found))


def _one_an_image(rows: Iterable[Entry]) -> list[Entry]:
    """One entry for all rows of an image, with the captions of all."""
    images: dict[str, Entry] = {}
    for row in rows:
        first = images.setdefault(row.id, row)
        if first is row:
            continue
        both = f"{first.place} and {row.place}: both are image {row.id!r}"
        if first.captions is None or row.captions is None:
            raise UserError(f"{both}, which must stand once, or have a caption in each of its rows")
        for name in ("label", "split", "group"):
            values = getattr(first, name), getattr(row, name)
            if values[0] != values[1]:
                says = f"but column {name!r} says {values[0]!r} and {values[1]!r}"
                raise UserError(f"{both}, {says}; only the captions of an image may differ")
        images[row.id] = replace(first, captions=(*first.captions, *row.captions))
    return list(images.values())
