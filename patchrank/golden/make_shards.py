"""Scores the images of a split and writes them as golden-rank shards; what is there already is not made again."""

from __future__ import annotations

import torch

from patchrank.config import GoldenConfig, validate
from patchrank.data.image_split import ImageSplit
from patchrank.golden.scores import METRICS, VERSION, batch_size_of, check_rounds, known_metrics, score_images
from patchrank.golden.shards import SHARD_SIZE, Sample, ShardFolder
from patchrank.io import content_id
from patchrank.layers import pruning
from patchrank.layers.schedule import check_locations
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress, write_line


def shard_folder(clip: Clip, split: ImageSplit, root: str, sha256: str | None = None, **settings) -> ShardFolder:
    """The folder that holds, or will hold, these scores; its name depends on all that they depend on.

    One round scores all metrics at once; more rounds are a search for each, and made for `metric` alone.

    Args:
        sha256: the pair's fingerprint, for callers that know it.
        **settings: of `GoldenConfig`; `remove_at` is a layer.

    Raises:
        UserError: settings that do not fit the tower or the split, such as a metric that needs labels where it has
            none, or templates that are functions.
    """
    golden = validate(GoldenConfig, settings, "golden")
    for template in filter(callable, split.templates):
        raise UserError(f"templates: shards say which ones they were scored with, so {template!r} must be a sentence")
    check_rounds(golden.rounds, clip.visual.num_patches)
    check_locations((golden.remove_at,), len(clip.visual.blocks))
    pruning.windows(clip.visual.patch_embed.grid_size, golden.window, golden.stride)
    labelled, named = split.labels is not None, bool(split.classes)
    known_metrics([golden.metric], labelled, named)  # asked for by name, so it is not left out as others are
    metrics = METRICS if golden.rounds == 1 else [golden.metric]
    header = {
        "schema": 1,
        "version": VERSION,
        "metrics": known_metrics(metrics, labelled, named),
        "grid": list(clip.visual.patch_embed.grid_size),
        "golden": golden.model_dump(exclude={"metric"}),
        "model": {"name": clip.name, "sha256": sha256 or clip.sha256()} | clip.prompts_about(),
        "data": {
            "task": split.task,
            "split": split.split,
            "ids_sha256": split.ids_sha256(),
            "decoding": split.decoding,
            "count": len(split),
            "labels_sha256": content_id(split.labels),
            "classes": list(split.classes),
            "templates": list(split.templates),
        },
        "transform": clip.transform_settings(),
        "shard_size": SHARD_SIZE,
    }
    return ShardFolder(root, header)


def score_shard(clip: Clip, split: ImageSplit, folder: ShardFolder, index: int, batch_size: int | None = None) -> None:
    """Scores and writes one shard. Batches never cross shards, so that stopping anywhere changes no byte."""
    first = index * SHARD_SIZE
    places = range(first, first + folder.sizes[index])
    transform, device = clip.transform(), clip.logit_scale.device
    contents = [split.content(i) for i in places]
    images = torch.stack([transform(split.decode(i, content)) for i, content in zip(places, contents)]).to(device)
    head = clip.zero_shot_head(split.classes, split.templates) if split.classes else None
    settings = folder.header["golden"] | {"metrics": folder.header["metrics"]}
    labels = None if split.labels is None else torch.tensor([split.label(i) for i in places], device=device)
    golden = score_images(
        clip.visual, images, head, labels, clip.logit_scale.exp().item(), batch_size=batch_size, **settings
    )
    scores, damage = (part.float().cpu().numpy() for part in golden)
    samples = (
        Sample(split.ids[i], contents[n], split.label(i), scores[n], damage[n], split.decoding)
        for n, i in enumerate(places)
    )
    folder.write(index, samples)


def make_shards(
    clip: Clip, split: ImageSplit, folder: ShardFolder, batch_size: int | None = None, quiet: bool = False
) -> str:
    """Makes what is missing or damaged of a folder, names it, and returns the folder's path."""
    faults, batch_size = folder.faults(), batch_size or batch_size_of(clip.logit_scale.device.type)
    report_faults(folder, faults)
    what = f"golden {split.task}/{split.split}"
    for index in progress(sorted(faults), desc=what, unit="shard", delay=0, disable=quiet or not faults):
        score_shard(clip, split, folder, index, batch_size)
    if faults or not folder.complete():
        folder.finish(batch=batch_size, threads=torch.get_num_threads(), passed_over=split.passed_over)
    return folder.path


def report_faults(folder: ShardFolder, faults: dict[int, str]) -> None:
    """One line on stderr for each shard that was there and is not sound."""
    for index, fault in faults.items():
        if fault != "not made yet":
            write_line(f"shard {folder.path}/shard-{index:06d}.tar is {fault}; making it again")
