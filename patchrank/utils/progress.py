"""Progress of long work on stderr: a bar on a terminal, and now and then a plain line in a pipe or a file.

Everything in this package that shows progress does so through this file.
"""

from __future__ import annotations

import functools
import io
import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

LOOK = 1.0  # seconds between two looks at whether a line is due
EVERY = 30.0  # seconds between two lines of the same work, where no bar can be drawn
SOON = 2.0  # seconds; work that is done by then leaves no line
PLAIN = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} to go{postfix}"
PLAIN_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit}s, {elapsed} gone{postfix}"

Bar = tqdm  # what `progress` returns: `update`, `set_postfix`, `close`, and a context manager


def progress(items: Iterable | None = None, total: float | None = None, **how) -> Bar:
    """A bar that shows how far work is. Iterate over it, or call its `update`.

    Args:
        items: what the bar iterates over.
        total: how much there is; the length of `items`, if it has one.
        **how: as for `tqdm`: `desc`, `unit` (in the singular), `initial`, `disable` (True shows nothing, None shows
            nothing but on a terminal), and `delay`: seconds before anything is shown. Say 0 where the first unit takes
            long, so that a log has a line at once.
    """
    if sys.stderr.isatty():
        return tqdm(items, total=total, file=sys.stderr, **how)
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    layout = PLAIN_WITHOUT_TOTAL if total is None else PLAIN
    how = {"delay": SOON} | how | {"mininterval": LOOK, "miniters": 1, "position": 0}  # others move the cursor
    return tqdm(items, total=total, file=_PlainLines(), bar_format=layout, **how)


def write_line(line: str) -> None:
    """Writes one line on stderr without breaking the bars that are there."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


@functools.cache
def write_once(line: str) -> None:
    """Writes a line on stderr that this process has not written before, such as one about data that is read again."""
    write_line(line)


class _PlainLines(io.TextIOBase):
    """Stands in for a terminal: stderr gets the first state that a bar draws on it, the last, and few between."""

    def __init__(self):
        self.printed, self.state, self.next = "", "", 0.0

    def write(self, text: str) -> int:
        """Takes what tqdm writes: a carriage return and a state, or the line break that ends the last one."""
        self.state = text.strip() or self.state
        is_last = text == "\n"
        if self.state != self.printed and (is_last or (self.state and time.monotonic() >= self.next)):
            print(self.state, file=sys.stderr, flush=True)
            self.printed, self.next = self.state, time.monotonic() + EVERY
        return len(text)
