"""How rows of a benchmark are shown: a table for people on stderr, and a Markdown page with the command above it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from patchrank.report.markdown import literal
from patchrank.report.markdown import table as markdown_table

Columns = Mapping[str, Callable[[Mapping], str]]  # what stands above a column, and a row's entry in it

METHODS: Columns = {
    "method": lambda row: row["method"],
    "left": lambda row: f"{100 * row['keep_rate']:.0f} %",
    "leave at layers": lambda row: leaving(row["drop_counts"], row["locations"]),
    "ms an image": lambda row: f"{row['ms']:.3f}" if row["ms"] < 10 else f"{row['ms']:.1f}",
    "spread": lambda row: f"{100 * row['spread']:.1f} %",
    "images/s": lambda row: number(row["images_per_second"]),
    "GMACs": lambda row: number(row["gmacs"]),
    "counted": lambda row: f"{row['counted_speedup']:.3f}",
    "measured": lambda row: f"{row['measured_speedup']:.3f}",
    "ratio": lambda row: f"{row['ratio']:.3f}",
    "ranking": lambda row: f"{100 * row['reducer_share']:.1f} %",
}
MEMORY: Columns = {"peak MiB": lambda row: number(row["peak_memory"] / 2**20)}  # of rows from a GPU
NOTE = (
    "`left`: share of patch tokens after the last location. `spread`: distance between the quartiles, as a share of "
    "the median. `counted`, `measured`: speed-up over the first method by MACs and by medians of the clock; `ratio`: "
    "measured over counted. `ranking`: share of an eager forward's time for ranking and matching."
)


def methods_columns(rows: Sequence[Mapping]) -> Columns:
    """The columns of a table of methods; peak memory where all rows have it."""
    return METHODS if any(row["peak_memory"] is None for row in rows) else {**METHODS, **MEMORY}


def number(value: float) -> str:
    """A positive number with about three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def leaving(counts: Sequence[int], layers: Sequence[int]) -> str:
    """How many tokens leave where, in short: `20 at 4 6 8 10`, `9 8 8 at 4 6 10`, `15-7 at 4-10`.

    Counts are a range only where they fall from the first to the last of many layers in a row.
    """
    if not counts:
        return "-"
    counts = [count for count in counts if count]
    in_a_row = len(layers) > 4 and list(layers) == list(range(layers[0], layers[-1] + 1))
    where = f"{layers[0]}-{layers[-1]}" if in_a_row else " ".join(map(str, layers))
    if len(set(counts)) == 1:
        many = str(counts[0])
    elif in_a_row and counts == sorted(counts, reverse=True):
        many = f"{counts[0]}-{counts[-1]}"
    else:
        many = " ".join(map(str, counts))
    return f"{many} at {where}"


def text_table(columns: Columns, rows: Sequence[Mapping]) -> str:
    """Rows below each other: words on the left, numbers on the right."""
    cells = [list(columns), *([entry(row) for entry in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for line in cells:
        parts = [
            text.ljust(width) if n == 0 else text.rjust(width) for n, (text, width) in enumerate(zip(line, widths))
        ]
        lines.append("  ".join(parts))
    return "\n".join(lines)


def markdown_page(title: str, command: Sequence[str], columns: Columns, rows: Sequence[Mapping], note: str = "") -> str:
    """A section of a page: what it is of, the command that made it, the machine, and a table for each batch size."""
    parts = [f"## {title}", f"```bash\npython -m patchrank.benchmark {shlex.join(command)}\n```", machine(rows[0])]
    for size, group in groupby(rows, lambda row: row.get("batch_size")):
        head = [] if size is None else [f"Batch size {size}:"]
        lines = [[literal(entry(row)) for entry in columns.values()] for row in group]
        parts += [*head, markdown_table(list(columns), lines)]
    return "\n\n".join([*parts, *([note] if note else [])]) + "\n"


def machine(row: Mapping) -> str:
    """What a table was measured on, how and when."""
    about = row["hardware"]
    where = about["gpu"] or f"{about['cpu']}, threads: {about['threads']}"
    how = [row["dtype"], *(name.replace("_", " ") for name in ("compile", "cuda_graphs") if row.get(name))]
    how += ["cuDNN attention"] if row.get("cudnn_attention") else []
    return f"{row['model']} on {where}; {', '.join(how)}; torch {about['torch']}; {row['date']}."
