"""Milliseconds of one tower and of its unpruned twin, in turns: what trials record."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from patchrank.config import DEFAULTS, BenchmarkConfig
from patchrank.models.clip import Clip
from patchrank.utils.clock import WARM_UP, seconds_of
from patchrank.utils.errors import UserError
from patchrank.utils.plain import plain
from patchrank.utils.progress import progress

VERSION = 2  # of the measurement: bump it when the same tower would get other milliseconds
BENCHMARK = BenchmarkConfig()


@torch.inference_mode()
def measure(
    model: nn.Module,
    batch_size: int = BENCHMARK.batch_size,
    repeats: int = BENCHMARK.repeats,
    seed: int = DEFAULTS.seed,
    quiet: bool = True,
) -> dict:
    """Milliseconds per image of a pruned tower, and of the same tower with nothing pruned and no prompts.

    The two take turns, so that whatever else the machine does falls on both alike; the first runs are thrown away.

    Args:
        model: a tower of ours or its pair, on the device to be measured.
        batch_size: images of a run, random ones of the size that the tower was made for.
        repeats: runs of each tower that count.

    Returns:
        `ms`, `ms_unpruned` (medians), `speedup` (their ratio), and `ms_quartiles`, `ms_unpruned_quartiles`.

    Raises:
        UserError: a ranking by oracles, which need scores that nobody could have in time.
    """
    batch_size, repeats, seed = plain((batch_size, repeats, seed))
    tower = model.visual if isinstance(model, Clip) else model
    if tower.pruner is not None and tower.pruning.reducer == "golden":
        raise UserError("reducer 'golden' ranks by scores from outside, so it has no time of its own; try prior")
    twin = copy.deepcopy(tower)  # as it came: nothing leaves, nothing is inserted, and all blocks are run in full
    twin.set_pruning(keep_rate=1.0, drop_counts=None, budget=None, cls_only_last="auto")
    twin.set_prompts(None)  # after pruning, whose lengths might not be kept to (`align`) without prompts
    towers = {"ms": tower, "ms_unpruned": twin}
    device = tower.pos_embed.device
    images = torch.randn(batch_size, *tower.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(seed))
    images = images.to(device, tower.pos_embed.dtype)
    times: dict[str, list[float]] = {name: [] for name in towers}
    for _ in progress(range(WARM_UP + repeats), desc="benchmark", unit="turn", disable=quiet):
        for name, each in towers.items():
            times[name].append(1000 * seconds_of(each, images) / batch_size)
    times = {name: values[WARM_UP:] for name, values in times.items()}
    found = {name: float(np.median(values)) for name, values in times.items()}
    quartiles = {f"{name}_quartiles": np.percentile(values, [25, 75]).tolist() for name, values in times.items()}
    return found | {"speedup": found["ms_unpruned"] / found["ms"]} | quartiles
