"""Evaluates pruned inference: accuracy, agreement, cosine, matching rate and MACs as one row.

A model without a text tower answers by its own classifier, and where images have labels also by the labels of the
nearest training images (docs/towers.md).

python -m patchrank.evaluate --data digits --split val --keep-rate 0.6
python -m patchrank.evaluate --model patchrank_clip_b16 --data caltech101 --data-root /data --split test
python -m patchrank.evaluate --model patchrank_clip_b16 --checkpoint clip.pt --data folder --data-root photos
python -m patchrank.evaluate --data digits --locations 4 --keep-rate 0.6 --bucket-rates 0.5,0.6,0.7
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from patchrank.cli.config_flags import add_config_flags, positive, reader, several
from patchrank.cli.flags import load_split_from
from patchrank.cli.summary import ACCURACIES, KNN, MATCHING, cosine_line, percentages
from patchrank.config import TrialConfig
from patchrank.config.base import Share
from patchrank.data.dataset_factory import find_task
from patchrank.data.image_split import ImageSplit
from patchrank.golden.agreement import matching, prior_of, rank_quality
from patchrank.golden.dataset import read_ranked
from patchrank.models.answers import NEIGHBOURS, Neighbours, known_labels, places_apart
from patchrank.models.buckets import BucketedTower, fit_buckets
from patchrank.models.clip import Clip
from patchrank.models.embed import answering, embed_unpruned, evaluate, over_batches, split_batches, unit
from patchrank.retrieval import measuring_parser, pair_and_split, print_measured, retrieval_from
from patchrank.utils.clock import WARM_UP, seconds_of
from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError
from patchrank.utils.stats import paired_interval

BUCKET_IMAGES = 1024  # training images that buckets are made from
KNN_IMAGES = 1024  # training images that neighbours are looked up among where nothing else answers
VERSION = 2  # of the evaluation and of what records hold: bump it when the same tower would get other figures


def shard_matching(clip: Clip, path: str) -> dict[str, float]:
    """Matching rate of the predictor in use on a folder of golden-rank shards, beside chance."""
    reducer, location = getattr(clip.visual.pruner, "reducer", None), clip.visual.pruning.locations[0]
    if reducer is None or not reducer.fitted or clip.visual.pruning.reducer == "prior":
        raise UserError("a matching rate needs pruning by reducer 'predictor', or another that ranks by a predictor")
    data = read_ranked(clip, path, reducer.about["metric"], location)
    quality = rank_quality(reducer.predictor, prior_of(data), data)
    found = matching(quality, clip.visual.num_patches)
    return {key: value for key, value in found.items() if key != "matching_prior"}


def compare_buckets(
    clip: Clip, buckets: BucketedTower, split: ImageSplit, unpruned: Tensor, batch_size: int, quiet: bool = False
) -> dict:
    """Figures of a tower with buckets on the images of a split, beside one keep rate for all at the same MACs.

    Changes are from one keep rate to buckets, paired by image, with the ends of 95 % intervals that draw groups of
    images (None where there is but one group).

    Args:
        unpruned: (n, E), what `embed_unpruned` gave.
    """
    batches = split_batches(clip, split, batch_size, "buckets", quiet)
    parts = over_batches(clip, batches, lambda images, _: buckets.forward_bucketed(images))
    raw, chosen = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    shares = (torch.bincount(chosen, minlength=len(buckets.keep_rates)) / len(split)).tolist()
    macs, groups = buckets.macs(shares), np.asarray(split.clusters())
    one_rate, drop_counts = at_macs(clip, split, macs, unpruned, batch_size)
    found = {"cosine": (unit(raw) * unit(unpruned).to(raw.device)).sum(-1).cpu().numpy()}
    if "accuracy" in one_rate:
        found["accuracy"] = 100.0 * (answering(clip, split)("pruned", raw) == known_labels(clip, split))
    row = {"bucket_rates": buckets.keep_rates, "bucket_shares": shares, "gmacs_bucketed": macs / 1e9}
    row |= speeds_beside(clip, drop_counts, buckets, split, batch_size, quiet)
    for name, values in found.items():
        change = paired_interval(values, one_rate[name], groups)
        row |= {f"{name}_bucketed": float(values.mean()), f"{name}_one_rate": float(one_rate[name].mean())}
        ends = [change.low, change.high] if change.is_known else [None, None]
        row |= {f"{name}_change": [change.estimate, *ends]}
    return row


def speeds_beside(
    clip: Clip, drop_counts: Sequence[int], buckets: BucketedTower, split: ImageSplit, batch_size: int, quiet: bool
) -> dict[str, float]:
    """Images per second of one schedule for all and of buckets: medians over batches, which both embed in turns."""
    towers = {"one_rate": clip.visual, "bucketed": buckets}
    seconds: dict[str, list[float]] = {name: [] for name in towers}

    def one_batch(images: Tensor, places: range) -> None:
        for tower in [*towers.values()] * (WARM_UP if places.start == 0 else 0):
            tower(images)
        for name, tower in sorted(towers.items(), reverse=places.start // batch_size % 2 == 1):
            seconds[name].append(seconds_of(tower, images) / len(images))

    with clip.visual.restoring():
        clip.visual.set_pruning(drop_counts=tuple(drop_counts), align=1)
        over_batches(clip, split_batches(clip, split, batch_size, "speed", quiet), one_batch)
    return {f"images_per_second_{name}": 1 / float(np.median(each)) for name, each in seconds.items()}


def at_macs(
    clip: Clip, split: ImageSplit, macs: float, unpruned: Tensor, batch_size: int
) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """Cosine and, where there are answers, accuracy (%) of each image (n,) with one keep rate that costs `macs`.

    Beside them, how many tokens leave at each location of the schedule whose MACs are nearest.

    A rate lets whole tokens leave, so this is the weighted mean of two schedules that are one token apart. Lengths of
    sequences are not rounded here (`align`), since one token could not leave then.
    """
    tower, found = clip.visual, []
    with tower.restoring():
        tower.set_pruning(budget=macs / tower.macs_unpruned().image, drop_counts=None, align=1)
        counts = [tower.pruner.drops.get(layer, 0) for layer in tower.pruning.locations]
        one_less = list(counts)
        one_less[counts.index(max(counts))] -= 1
        for each in (counts, one_less):
            tower.set_pruning(drop_counts=tuple(each), align=1)
            measured = evaluate(clip, split, batch_size=batch_size, quiet=True, unpruned=unpruned)
            figures = {"cosine": measured.cosine["pruned"]}
            if measured.answers and measured.labels is not None:
                figures["accuracy"] = 100.0 * measured.right()
            found.append((tower.macs().image, figures))
    (less, below), (more, above) = found
    share = (macs - less) / (more - less)
    figures = {name: (1 - share) * below[name] + share * above[name] for name in below}
    return figures, tuple(counts if share < 0.5 else one_less)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    classification = ("controls", "bucket_rates", "knn_images")
    for flag, task in (("index", "retrieval"), *((flag, "classification") for flag in classification)):
        if getattr(args, flag) and args.task != task:
            raise UserError(f"--{flag.replace('_', '-')} goes with --task {task}, which is not given")
    clip, split = pair_and_split(args)
    found = shard_matching(clip, args.shards) if args.shards else {}
    if args.task == "retrieval":
        measured, lines = retrieval_from(args, clip, split)
    else:
        _note_on_answers(clip, split)
        buckets = fit_buckets(clip, [_bucket_images(args, split)], args.bucket_rates) if args.bucket_rates else None
        neighbours = _neighbours(args, clip, split)
        unpruned = None if buckets is None else embed_unpruned(clip, split, args.batch_size)
        given = {"batch_size": args.batch_size, "seed": args.seed, "unpruned": unpruned, "neighbours": neighbours}
        measured = evaluate(clip, split, args.controls, **given).row()
        lines = [*percentages(measured, ACCURACIES), *percentages(measured, KNN), cosine_line(measured)]
        if neighbours is not None:
            measured["n_knn_images"] = len(neighbours.labels)
            lines.append(("labelled images to find neighbours among", f"{len(neighbours.labels):,}"))
        if buckets is not None:
            measured |= compare_buckets(clip, buckets, split, unpruned, args.batch_size)
            lines += _bucket_lines(measured)
    print_measured(args, args.task, clip, split, measured | found, [*lines, *percentages(found, MATCHING)])


def _note_on_answers(clip: Clip, split: ImageSplit) -> None:
    """Says on stderr why there are no answers, or no accuracy, where a user may have expected some."""
    note = ""
    if clip.has_text and not split.classes:
        what = "labels are numbers: name them" if split.labels is not None else "classes have no names: give them"
        note = f"{split.task}: {what} with --vocabulary to get answers; without, cosine alone"
    elif not clip.has_text and clip.classifier is not None and known_labels(clip, split) is None:
        note = f"{split.task}: whether {clip.name}'s own answers are right is not known, since its classes and those "
        note += "of the images have no names in common; agreement with the unpruned answers is"
    if note:
        print(note, file=sys.stderr)


def _neighbours(args: argparse.Namespace, clip: Clip, split: ImageSplit) -> Neighbours | None:
    """The training images that answer too, where flags ask for them or there are labels and no text tower."""
    count = args.knn_images or (None if clip.has_text or split.labels is None else KNN_IMAGES)
    if count is None:
        return None
    train = _training_images(args, count)
    apart = train.take(places_apart(train, split))
    if len(apart) and split.labels is not None and train.labels is not None:
        return Neighbours(embed_unpruned(clip, apart, args.batch_size), torch.tensor(apart.labels))
    why = f"all images of split {train.split!r} are among those of {split.split!r}; try --split val"
    why = why if split.labels is not None and train.labels is not None else "images have no labels"
    print(f"{split.task}: nearest neighbours cannot answer, since {why}", file=sys.stderr)
    return None


def _training_images(args: argparse.Namespace, count: int) -> ImageSplit:
    """The first so many images of the task's training split."""
    return load_split_from(argparse.Namespace(**vars(args) | {"split": find_task(args.data).training, "limit": count}))


def _bucket_images(args: argparse.Namespace, split: ImageSplit) -> ImageSplit:
    """The images that buckets are made from. Raises `UserError` where some of them are to be evaluated."""
    train = _training_images(args, BUCKET_IMAGES)
    if both := set(train.ids) & set(split.ids):
        raise UserError(
            f"--bucket-rates: {len(both):,} images of split {split.split!r} are among those that buckets are made from "
            f"(split {train.split!r}); try --split val"
        )
    return train


def _bucket_lines(row: dict) -> list[tuple[str, str]]:
    """The lines of a command's table on buckets."""
    buckets = zip(row["bucket_rates"], row["bucket_shares"])
    lines = [("buckets", ", ".join(f"keep rate {rate:g}: {100 * share:.0f} %" for rate, share in buckets))]
    for name, shown in (("accuracy", "{:.2f} %"), ("cosine", "{:.5f}")):
        if f"{name}_bucketed" in row:
            two = [shown.format(row[f"{name}_{which}"]) for which in ("bucketed", "one_rate")]
            lines.append((f"{name} with buckets", f"{two[0]} (one rate at the same MACs: {two[1]})"))
    lines.append(("MACs of an image with buckets", f"{1000 * row['gmacs_bucketed']:.1f} M"))
    speeds = [f"{row[f'images_per_second_{which}']:.0f}" for which in ("bucketed", "one_rate")]
    return [*lines, ("images per second with buckets", f"{speeds[0]} (one rate at the same MACs: {speeds[1]})")]


def _parser() -> argparse.ArgumentParser:
    parser = measuring_parser("evaluate", __doc__)
    what = "retrieval: what patchrank.retrieval measures (default: classification)"
    parser.add_argument("--task", choices=("classification", "retrieval"), default="classification", help=what)
    add_config_flags(parser, TrialConfig, "controls")
    what = (
        "adds a second measurement in which every image gets one of these 2 to 4 keep rates, a higher one the more its "
        "embedding is likely to change, at the mean MACs of --keep-rate or --budget; for example 0.5,0.6,0.7"
    )
    parser.add_argument("--bucket-rates", type=several(reader(Share)), metavar="RATES", help=what)
    what = (
        f"labelled training images that the {NEIGHBOURS} nearest neighbours of each image are looked up among, which "
        f"answer by a vote (default: {KNN_IMAGES} where the model has no text tower, none where it has)"
    )
    parser.add_argument("--knn-images", type=positive, metavar="N", help=what)
    parser.add_argument("--shards", help="folder of golden-rank shards: adds the predictor's matching rate on them")
    return parser


if __name__ == "__main__":
    run_command(main)
