"""Scores the images of a split and writes them as golden-rank shards; what is there already is not made again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from patchrank.config import GoldenConfig, validate
from patchrank.data.image_split import THREADS, ImageSplit
from patchrank.golden.batch_size import batch_size_of
from patchrank.golden.scores import METRICS, VERSION, check_rounds, known_metrics, score_images
from patchrank.golden.shards import SHARD_SIZE, Sample, ShardFolder
from patchrank.io import content_id
from patchrank.layers import pruning
from patchrank.layers.schedule import check_locations
from patchrank.models.answers import known_labels
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress, write_line


def shard_folder(
    clip: Clip, split: ImageSplit, root: str, sha256: str | None = None, autocast: str | None = None, **settings
) -> ShardFolder:
    """The folder that holds, or will hold, these scores; its name depends on all that they depend on.

    One round scores all metrics at once; more rounds are a search for each, and made for `metric` alone.

    Args:
        sha256: the pair's fingerprint, for callers that know it.
        autocast: the type that matrix products run in, a key of `AUTOCAST`; None for that of the weights.
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
    labelled, named = known_labels(clip, split) is not None, bool(split.classes)
    if not clip.has_text:
        named = clip.classifier is not None
        _check_metric(clip, golden.metric, labelled, named)
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
    } | ({} if autocast is None else {"autocast": autocast})
    return ShardFolder(root, header)


def score_shard(clip: Clip, split: ImageSplit, folder: ShardFolder, index: int, batch_size: int | None = None) -> int:
    """Scores and writes one shard; returns how many sequences ran at a time.

    Batches never cross shards, so that stopping anywhere changes no byte.
    """
    batch_size = batch_size or _batch_size_of(clip, folder)
    for loaded in _read_ahead(clip, split, folder, [index]):
        _score(clip, split, folder, loaded, batch_size)
    return batch_size


def make_shards(
    clip: Clip,
    split: ImageSplit,
    folder: ShardFolder,
    batch_size: int | None = None,
    quiet: bool = False,
    compile: bool = False,
) -> str:
    """Makes what is missing or damaged of a folder, names it, and returns the folder's path.

    Args:
        batch_size, compile: as for `score_images`; the manifest has them.

    Raises:
        UserError: an image that cannot be read or decoded, once all shards before its own are written.
    """
    faults = folder.faults()
    report_faults(folder, faults)
    if faults:
        batch_size = batch_size or _batch_size_of(clip, folder)
        loaded, what = _read_ahead(clip, split, folder, sorted(faults)), f"golden {split.task}/{split.split}"
        for each in progress(loaded, total=len(faults), desc=what, unit="shard", delay=0, disable=quiet):
            _score(clip, split, folder, each, batch_size, compile)
    if faults or not folder.complete():
        how = {"batch": batch_size, "compile": compile, "threads": torch.get_num_threads()}
        folder.finish(**how, passed_over=split.passed_over)
    return folder.path


def _check_metric(clip: Clip, metric: str, labelled: bool, named: bool) -> None:
    """Raises `UserError` for a metric that a model without a text tower cannot have on these images."""
    why = {
        "label": "" if named and labelled else "right answers by the classifier's own class names, which are not known",
        "confidence": "" if named else f"answers, and {clip.name} has neither a text tower nor a classifier",
    }
    if need := why.get(metric):
        raise UserError(f"golden.metric {metric!r} needs {need}; try preservation")


class _Loaded(NamedTuple):
    """One shard's number, and its images: their places in the split, their bytes, and as the tower sees them."""

    index: int
    places: range
    contents: Sequence[bytes]
    images: Tensor


def _read_ahead(clip: Clip, split: ImageSplit, folder: ShardFolder, indices: Sequence[int]) -> Iterator[_Loaded]:
    """The images of shards; threads read and decode those of the next shard while the caller works on this one.

    An image that cannot be read or decoded raises when it is its shard's turn.
    """
    transform, pool = clip.transform(), ThreadPoolExecutor(THREADS)
    run = map if split.drawn else pool.map  # threads do not speed up what is drawn in Python, but slow scoring down

    def one(i: int) -> tuple[bytes, Tensor]:
        content = split.content(i)
        return content, transform(split.decode(i, content))

    try:
        waiting = deque()
        for index in [*indices, None]:
            if index is not None:
                places = range(index * SHARD_SIZE, index * SHARD_SIZE + folder.sizes[index])
                waiting.append((index, places, run(one, places)))
            if index is None or len(waiting) > 1:
                number, places, found = waiting.popleft()
                contents, images = zip(*found)
                yield _Loaded(number, places, contents, torch.stack(images))
    finally:
        pool.shutdown(cancel_futures=True)


def _score(
    clip: Clip, split: ImageSplit, folder: ShardFolder, loaded: _Loaded, batch_size: int, compile: bool = False
) -> None:
    """Scores and writes one shard."""
    device, labels = clip.logit_scale.device, known_labels(clip, split)
    head = clip.zero_shot_head(split.classes, split.templates) if split.classes and clip.has_text else None
    settings = folder.header["golden"] | {"metrics": folder.header["metrics"]}
    if labels is not None:
        labels = torch.tensor([labels[i] for i in loaded.places], device=device)
    how = {"batch_size": batch_size, "compile": compile, "autocast": folder.header.get("autocast")}
    how |= {"classifier": clip.classifier} if not clip.has_text and clip.classifier is not None else {}
    scale = clip.logit_scale.exp().item()
    golden = score_images(clip.visual, loaded.images.to(device), head, labels, scale, **settings, **how)
    scores, damage = (part.float().cpu().numpy() for part in golden)
    samples = (
        Sample(split.ids[i], loaded.contents[n], split.label(i), scores[n], damage[n], split.decoding)
        for n, i in enumerate(loaded.places)
    )
    folder.write(loaded.index, samples)


def _batch_size_of(clip: Clip, folder: ShardFolder) -> int:
    golden = folder.header["golden"]
    return batch_size_of(clip.visual, golden["remove_at"], golden["window"])


def report_faults(folder: ShardFolder, faults: dict[int, str]) -> None:
    """One line on stderr for each shard that was there and is not sound."""
    for index, fault in faults.items():
        if fault != "not made yet":
            write_line(f"shard {folder.path}/shard-{index:06d}.tar is {fault}; making it again")
