"""Whether half precision pays: a few windows are timed and ranked both ways before scores are made with it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from patchrank.config import GoldenConfig
from patchrank.data.image_split import ImageSplit
from patchrank.golden.batch_size import batch_size_of
from patchrank.golden.suffix import AUTOCAST, Suffix
from patchrank.layers import pruning
from patchrank.models.clip import Clip
from patchrank.utils.device import full_precision
from patchrank.utils.metrics import kendall
from patchrank.utils.progress import write_line

LEAST_SPEED = 1.1  # times as fast; less may be chance, since each way is timed once
IMAGES, WINDOWS = 2, 16  # that are tried: some seconds for B/16 on a CPU
LEAST_TAU = 0.95  # 39 of 40 pairs of windows in the same order
FEW_TOKENS = 16  # of one layer, which is tried first: some CPUs take 300 times as long
FAR_SLOWER = 20.0  # times; small products may be slower than large ones, since weights are converted as well


@torch.inference_mode()
def autocast_pays(clip: Clip, split: ImageSplit, golden: GoldenConfig, autocast: str) -> bool:
    """Whether scores are made faster with autocast, and rank windows as they do without; a line on stderr says so.

    Windows are ranked by preservation, which every split has.

    Args:
        golden: settings that fit the tower; `remove_at` is a layer.
        autocast: a key of `AUTOCAST`.

    Raises:
        UserError: an image that cannot be read or decoded.
    """
    tower, transform = clip.visual, clip.transform()
    images = torch.stack([transform(split.image(i)) for i in range(min(IMAGES, len(split)))])
    tokens = tower.forward_prefix(images.to(clip.logit_scale.device), golden.remove_at)
    slower = _slower_in_one_layer(tower.blocks[golden.remove_at - 1], tokens[:1, :FEW_TOKENS], autocast)
    if slower > FAR_SLOWER:
        write_line(f"autocast {autocast}: one layer takes {slower:.0f} times as long; scores are made without")
        return False
    plain, plain_seconds = _damage(tower, tokens, golden, None)
    found, seconds = _damage(tower, tokens, golden, autocast)
    speed, tau = plain_seconds / seconds, float(kendall(found.cpu().numpy(), plain.cpu().numpy()).mean())
    pays = speed >= LEAST_SPEED and tau >= LEAST_TAU
    write_line(
        f"autocast {autocast}: {speed:.2f} times as fast, Kendall's tau of windows {tau:.3f} (at least "
        f"{LEAST_SPEED} and {LEAST_TAU} are wanted); scores are made with{'' if pays else 'out'}"
    )
    return pays


def _slower_in_one_layer(block: nn.Module, x: Tensor, autocast: str) -> float:
    """How many times as long a layer takes with autocast for a few tokens (1, L, D)."""
    seconds = []
    for enabled in (False, True):
        with full_precision(), torch.autocast(x.device.type, AUTOCAST[autocast], enabled):
            block(x)  # prepares kernels
            seconds.append(_timed(lambda: block(x), x.device)[1])
    return seconds[1] / seconds[0]


def _damage(tower: nn.Module, tokens: Tensor, golden: GoldenConfig, autocast: str | None) -> tuple[Tensor, float]:
    """Damage (B, W) of windows that are evenly spread over images, and the seconds that it took."""
    squares = pruning.windows(tower.patch_embed.grid_size, golden.window, golden.stride).to(tokens.device)
    squares = squares[torch.linspace(0, len(squares) - 1, min(WINDOWS, len(squares))).round().long()]
    alive = tokens.new_ones(len(tokens), tower.num_patches, dtype=torch.bool)
    batch_size = batch_size_of(tower, golden.remove_at, golden.window)
    with full_precision():
        suffix = Suffix(tower, tokens, golden.remove_at, batch_size, autocast=autocast)
        whole = suffix.whole().double()
        pieces, seconds = _timed(lambda: suffix.without(squares, alive).double(), tokens.device)
    return 1 - torch.cosine_similarity(pieces, whole[:, None], dim=-1), seconds


def _timed(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """What a run gives, and its seconds; on a GPU, those of a second run, since the first one prepares kernels."""
    if device.type == "cuda":
        run()
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - start
