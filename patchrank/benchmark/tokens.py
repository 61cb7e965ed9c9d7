"""Milliseconds of a tower's blocks against the number of tokens: latency may go in steps where MACs do not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median

from torch import Tensor, nn

from patchrank.benchmark.compare import told
from patchrank.benchmark.mode import Mode
from patchrank.benchmark.table import Columns, number
from patchrank.layers.macs import block_macs, hidden_size
from patchrank.models.model_name import stable_name
from patchrank.report.plots.style import PALETTE, png
from patchrank.utils.clock import device_seconds, in_turns
from patchrank.utils.errors import UserError

COLUMNS: Columns = {
    "tokens": lambda row: str(row["tokens"]),
    "ms": lambda row: f"{row['ms']:.3f}",
    "spread": lambda row: f"{100 * row['spread']:.1f} %",
    "GMACs": lambda row: number(row["gmacs"]),
    "ms by MACs": lambda row: f"{row['ms_by_macs']:.3f}",
    "over it": lambda row: f"{row['ms'] / row['ms_by_macs']:.3f}",
}
NOTE = (
    "Tokens: the length of the sequence, class token included. `ms`: of all blocks for one batch. `ms by MACs`: the "
    "MACs times the median of ms per MAC over all lengths; `over it` above 1 is a length that costs more than its MACs."
)


def read_counts(text: str) -> list[int]:
    """The numbers of tokens that a flag `FIRST:LAST:STEP` names, for argparse."""
    try:
        first, last, step = map(int, text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"should be FIRST:LAST:STEP, such as 16:197:8, but is {text!r}") from error
    if not (1 <= first <= last <= 2**16 and step >= 1):
        raise argparse.ArgumentTypeError(f"needs 1 <= FIRST <= LAST <= 65536 and a STEP of at least 1, but is {text!r}")
    return list(range(first, last + 1, step))


def time_tokens(
    tower: nn.Module,
    model: str,
    mode: Mode,
    counts: Sequence[int],
    batch_sizes: Sequence[int],
    repeats: int,
    seed: int = 0,
    quiet: bool = True,
) -> list[dict]:
    """Rows with the milliseconds of all blocks, run in full on random sequences, for each number of tokens.

    Args:
        tower: as `mode` places it.
        counts: lengths of sequences, class token included.
    """

    def blocks(x: Tensor) -> Tensor:
        return tower.blocks(x)

    run, rows = mode.compiled(blocks), []
    for size in batch_sizes:
        with mode.running():
            runs = {}
            for count in counts:
                x = mode.random(size, count, tower.embed_dim, seed=seed)
                ready = mode.ready(f"{count} tokens", run, x)
                runs[str(count)] = partial(device_seconds, ready, x)
            timings = in_turns(runs, repeats, seed, desc=f"tokens, batch size {size}", quiet=quiet)
        found = [
            {"model": stable_name(model), "tokens": count, "batch_size": size, "ms": 1000 * timings[str(count)].median}
            | {"spread": timings[str(count)].spread, "gmacs": size * _macs(tower, count) / 1e9}
            for count in counts
        ]
        rate = median(row["ms"] / row["gmacs"] for row in found)
        rows += [row | {"ms_by_macs": rate * row["gmacs"], "repeats": repeats} | told(mode) for row in found]
    return rows


def _macs(tower: nn.Module, count: int) -> int:
    """MACs of all blocks for one sequence."""
    return len(tower.blocks) * block_macs(count, tower.embed_dim, hidden_size(tower.blocks[0]))


def check_drawing() -> None:
    """Raises `UserError` where `draw_tokens` could not draw, before minutes are spent on what it is to draw."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--picture needs the package matplotlib ({error}); try pip install matplotlib, or leave --picture out"
        ) from error


def draw_tokens(rows: Sequence[dict]) -> bytes:
    """PNG: a panel for each batch size, with what was measured and, as a line, what MACs alone would say."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    figure = Figure(figsize=(1.2 + 4.3 * len(sizes), 3.6), layout="constrained")
    for size, panel in zip(sizes, figure.subplots(1, len(sizes), squeeze=False)[0]):
        some = [row for row in rows if row["batch_size"] == size]
        counts = [row["tokens"] for row in some]
        panel.plot(counts, [row["ms_by_macs"] for row in some], color="#777777", lw=1, ls="--", label="by MACs alone")
        panel.plot(counts, [row["ms"] for row in some], color=PALETTE[0], lw=1.3, marker="o", ms=3.5, label="measured")
        panel.set_title(f"{some[0]['model']}, {some[0]['dtype']}, batch size {size}", fontsize=9)
        panel.set_xlabel("tokens of a sequence, class token included", fontsize=9)
        panel.set_ylabel("ms of all blocks", fontsize=9)
        panel.set_xlim(0, None)
        panel.set_ylim(0, None)
        panel.grid(lw=0.4, color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.legend(fontsize=8, frameon=False)
    return png(figure)
