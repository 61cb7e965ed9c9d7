"""How fast golden scoring is: windows per second of ours, of timm's own blocks, and of scoring from the pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchrank.benchmark.compare import told
from patchrank.benchmark.mode import Mode
from patchrank.benchmark.table import Columns, number
from patchrank.golden.scores import score_images
from patchrank.golden.suffix import shares_qkv
from patchrank.layers.class_token import can_skip_rows
from patchrank.layers.macs import block_macs, hidden_size, vision_macs
from patchrank.layers.pooling import pool_macs
from patchrank.layers.pruning import take, windows
from patchrank.layers.schedule import check_locations
from patchrank.models.model_name import stable_name
from patchrank.utils.clock import Timing, device_seconds, in_turns

# Sequences that may run at a time in what ours is compared with; the fastest number is found before the turns.
BATCH_SIZES = {"cpu": (4, 16, 49), "cuda": (128, 512, 1024)}
COMPARED = {"cpu": 196, "cuda": 4096}  # sequences, about, of one of their runs
SIDE = 8192  # of the square matrices whose product tells what a GPU can do
WARM_UP = 1  # turns; each of them runs hundreds of sequences
OURS = "golden scoring"

COLUMNS: Columns = {
    "way to score": lambda row: row["method"],
    "windows/s": lambda row: number(row["windows_per_second"]),
    "spread": lambda row: f"{100 * row['spread']:.1f} %",
    "sequences at a time": lambda row: "-" if row["sequences"] is None else str(row["sequences"]),
    "golden scoring over it": lambda row: f"{row['ratio']:.3f}",
    "of the matrix rate": lambda row: "-" if row["matmul_share"] is None else f"{100 * row['matmul_share']:.0f} %",
}
NOTE = (
    "`timm blocks`: the blocks from that layer on, in full, on random sequences of the same length. `from pixels`: "
    "each window alone through the whole tower. Both run at the batch size that is fastest without compilation. "
    "`of the matrix rate`: the FLOPs that golden scoring needs for a window, over those of a large square product."
)


def compare_scoring(
    tower: nn.Module,
    model: str,
    mode: Mode,
    images: int,
    window: int,
    remove_at: int,
    repeats: int,
    seed: int = 0,
    quiet: bool = True,
) -> list[dict]:
    """Rows of three ways to score windows, in turns: ours, and two others at the batch size that suits them best.

    `timm blocks` are the blocks from `remove_at` on, run in full on random sequences of the same length: what ours
    would take if nothing but these blocks ran, and nothing of them was saved. `from pixels` runs each window alone
    through patch embedding, all blocks in full and the head, in batches. All three are compiled where `mode` says so.

    Args:
        tower: unpruned, of ours, as `mode` places it.
        images: of a run of ours.
        window, remove_at: as for `score_images`.

    Raises:
        UserError: a window or a layer that the tower does not have, or a way that cannot be compiled.
    """
    (remove_at,) = check_locations((remove_at,), len(tower.blocks))
    squares = windows(tower.patch_embed.grid_size, window)
    kept = kept_without(squares, tower).to(mode.device)
    with mode.running():
        pixels = mode.random(images, *tower.pretrained_cfg["input_size"], seed=seed)
        ways = _ways(tower, pixels, kept, window, remove_at, mode)
        timings = in_turns({name: way.run for name, way in ways.items()}, repeats, seed, WARM_UP, "scoring", quiet)
        peak = matmul_rate(mode) if mode.on_gpu else None
    rate = {name: way.windows / timings[name].median for name, way in ways.items()}
    macs = window_macs(tower, len(squares), kept.shape[1], remove_at)
    about = {"model": stable_name(model), "images": images, "window": window, "remove_at": remove_at}
    rows = []
    for name, way in ways.items():
        row = about | {"method": name, "sequences": way.sequences, "windows_per_second": rate[name]}
        row |= {"spread": timings[name].spread, "ratio": rate[OURS] / rate[name]}
        share = 2 * macs * rate[name] / peak if peak and name == OURS else None  # what others need is not counted here
        row |= {"matmul_tflops": peak and peak / 1e12, "matmul_share": share}
        rows.append(row | {"repeats": repeats} | told(mode))
    return rows


class Way(NamedTuple):
    """A way to score: a run that returns its seconds, how many windows that run has, and how many run at a time.

    sequences: None for ours, which decides by itself.
    """

    run: Callable[[], float]
    windows: int
    sequences: int | None = None


def kept_without(squares: Tensor, tower: nn.Module) -> Tensor:
    """For each window the places (W, L) in a sequence of all tokens that are not of it."""
    member = torch.zeros(len(squares), tower.num_patches, dtype=torch.bool).scatter_(1, squares, True)
    patches = (~member).nonzero()[:, 1].view(len(squares), -1) + tower.num_leading_tokens
    leading = torch.arange(tower.num_leading_tokens).expand(len(squares), -1)
    return torch.cat([leading, patches], dim=1)


def _ways(tower: nn.Module, pixels: Tensor, kept: Tensor, window: int, remove_at: int, mode: Mode) -> dict[str, Way]:
    """The ways to score that are compared, ours first."""

    def score(images: Tensor) -> Tensor:
        return score_images(tower, images, window=window, remove_at=remove_at, compile=mode.compile).scores

    def windows_of(images: Tensor) -> Tensor:
        return from_pixels(tower, images, kept[torch.arange(len(images), device=kept.device) % len(kept)], remove_at)

    def sequences(size: int) -> Tensor:
        return mode.random(size, kept.shape[1], tower.embed_dim)

    def repeated(size: int) -> Tensor:
        return pixels[torch.arange(size, device=pixels.device) % len(pixels)]

    return {
        OURS: Way(partial(device_seconds, score, pixels), len(pixels) * len(kept)),
        "timm blocks": _fastest("timm blocks", tower.blocks[remove_at - 1 :], sequences, mode),
        "from pixels": _fastest("from pixels", windows_of, repeated, mode),
    }


def from_pixels(tower: nn.Module, images: Tensor, kept: Tensor, remove_at: int) -> Tensor:
    """Embeddings (B, E) of images (B, 3, H, W) without a window each, in the straightforward way: nothing is shared.

    Args:
        kept: (B, L), places of the tokens that stay when they enter layer `remove_at`.
    """
    x = take(tower.forward_prefix(images, remove_at), kept)
    return tower.forward_head(tower.norm(tower.blocks[remove_at - 1 :](x)))


def _fastest(name: str, run: Callable[[Tensor], Tensor], batch: Callable[[int], Tensor], mode: Mode) -> Way:
    """A way in batches of the size at which it is fastest, as many of them as make a run of `COMPARED` sequences.

    The size is found without compilation, and then one graph is compiled for it: one for each size would take minutes.
    """
    kind = "cuda" if mode.on_gpu else "cpu"
    seconds = {}
    for size in BATCH_SIZES[kind]:
        x = batch(size)
        seconds[size] = min(device_seconds(run, x) for _ in range(2)) / size
    best = min(seconds, key=seconds.__getitem__)
    x, count = batch(best), max(1, round(COMPARED[kind] / best))
    if mode.compile:
        run = mode.ready(name, mode.compiled(run), x)

    def batches(x: Tensor) -> None:
        for _ in range(count):
            run(x)

    return Way(partial(device_seconds, batches, x), count * best, best)


def window_macs(tower: nn.Module, count: int, length: int, remove_at: int) -> float:
    """MACs that a window needs, with those of the whole image shared by its `count` windows.

    Where no more is read, the class token alone is counted in the last block. A prefix is counted once an image, and
    so are queries, keys and values of the first layer where golden scoring shares them.
    """
    depth, hidden = len(tower.blocks), hidden_size(tower.blocks[0])
    shared = 3 * tower.embed_dim**2 * length if shares_qkv(tower, remove_at) else 0
    skips = can_skip_rows(tower)
    own = sum(
        block_macs(length, tower.embed_dim, hidden, cls_only=skips and layer == depth)
        for layer in range(remove_at, depth + 1)
    )
    own += pool_macs(tower, length - tower.num_leading_tokens) + tower.embed_dim * tower.num_classes
    return own - shared + vision_macs(tower, cls_only_last=skips) / count


def matmul_rate(mode: Mode, turns: int = 10) -> float:
    """FLOP/s of a large square product of random matrices, in the precision of a mode: median of some runs."""
    a, b = (mode.random(SIDE, SIDE, seed=seed) for seed in (0, 1))
    for _ in range(3):
        a @ b
    return 2 * SIDE**3 / Timing.of([device_seconds(lambda x: x @ b, a) for _ in range(turns)]).median
