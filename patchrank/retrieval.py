"""Retrieval: how far a pruned tower's embeddings drift from a search index that was built with the unpruned tower.

python -m patchrank.retrieval --data digits --limit 360 --keep-rate 0.6
python -m patchrank.retrieval --data folder --data-root photos --keep-rate 0.6 --reducer center --index photos.npy

Where something else is as near as the right answer, the answer counts as found: no search could tell the two apart.

Shapes: n images, T texts, E width of embeddings.
"""

from __future__ import annotations

import argparse
import io
import os
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchrank.cli.flags import create_pruned_clip_from, evaluation_row, load_split_from, pruned_parser
from patchrank.cli.summary import images_line, macs_line, print_row, pruning_title
from patchrank.data.dataset_factory import find_task
from patchrank.data.image_split import ImageSplit
from patchrank.io import check_writable, exists, read_bytes, resolve, write_atomic
from patchrank.models.clip import Clip
from patchrank.models.embed import BATCH_SIZE, embed, embed_unpruned, split_batches
from patchrank.models.text import encode_texts
from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError
from patchrank.utils.metrics import percent
from patchrank.utils.nearest import is_within, nearest, own_distance, shared
from patchrank.utils.progress import write_line

KS = (1, 5, 10)
PROBES = 64  # images of a split that an index is checked with
LABELS = {  # of the figures of a row, for people
    "image_recall@k": "recall of the image itself",
    "image_neighbours@k": "neighbours found again",
    "image_neighbours@k_reindexed": "the same, index built anew",
    "text_recall@k": "recall of the true text",
    "text_recall@k_unpruned": "the same, unpruned",
    "texts@k": "texts found again",
    "text_to_image_recall@k": "recall of an image by its text",
    "text_to_image_recall@k_unpruned": "the same, unpruned",
}


@dataclass
class Retrieval:
    """What one pruning does to search, image by image in the order of the split.

    shares: figure -> (n,), or (T,) where texts are the queries, from 0 to 1. drift (n,): 1 - cosine of an image's two
    embeddings: unpruned (n, E), the index, and pruned (n, E), what would take its place. num_texts: different texts,
    None without captions and class names.
    """

    shares: dict[str, np.ndarray]
    drift: np.ndarray
    unpruned: Tensor
    pruned: Tensor
    num_texts: int | None = None

    def row(self) -> dict[str, float]:
        """Percentages of every figure, then drift and counts."""
        row: dict[str, float] = {name: percent(share) for name, share in self.shares.items()}
        drift = {"mean": self.drift.mean(), "p95": np.quantile(self.drift, 0.95), "max": self.drift.max()}
        row |= {f"drift_{name}": float(value) for name, value in drift.items()} | {"n_images": len(self.drift)}
        return row if self.num_texts is None else row | {"n_texts": self.num_texts}


@torch.inference_mode()
def retrieval(
    clip: Clip,
    split: ImageSplit,
    ks: Sequence[int] = KS,
    batch_size: int = BATCH_SIZE,
    quiet: bool = False,
    index: Tensor | None = None,
) -> Retrieval:
    """What the pruning that `clip.visual` has does to search among the images and texts of a split.

    Texts are captions, equal ones counted once, or else the class prompts; without either, or without a text tower,
    images and drift alone. An image may have several captions (Flickr30k and COCO have five): any of them is a right
    answer to it, and each is a query whose right answers are the images that have it. This is the protocol of Karpathy
    and Fei-Fei (2015), but for captions that several images have, which count once and are right for each of these.

    Args:
        ks: how many results are looked at; those that are not below the number of candidates are left out.
        index: (n, E), unpruned embeddings of these images in this order; computed here if left out.

    Raises:
        UserError: a k below 1, or an index that does not hold these images in this order.
    """
    if not ks or any(type(k) is not int or k < 1 for k in ks):
        raise UserError(f"ks must be one or more whole numbers from 1, but are {tuple(ks)}; try {KS}")
    if index is not None:
        index = index.to(clip.logit_scale.device)
        _check_order(clip, split, batch_size, index)
    batches = split_batches(clip, split, batch_size, "retrieval", quiet)
    vectors, _ = embed(clip, batches, with_unpruned=index is None)
    pruned, unpruned = vectors["pruned"], vectors["unpruned"] if index is None else index
    shares, texts = image_shares(pruned, unpruned, ks, quiet), None
    if clip.has_text and split.captions is not None:
        captions, places = split.numbered_captions()
        if "" in captions:
            write_line(f"{split.task}/{split.split}: some images have an empty caption, which counts as a text")
        most = max(map(len, places))  # shorter rows are filled with their first caption, which changes nothing
        right = torch.tensor([own + own[:1] * (most - len(own)) for own in places], device=pruned.device)
        texts = encode_texts(clip.encode_text, captions, "captions", quiet)
        shares |= text_shares(pruned, unpruned, texts, right, ks, quiet)
        shares |= text_to_image_shares(pruned, unpruned, texts, right, ks, quiet)
    elif clip.has_text and split.classes:
        texts = clip.zero_shot_head(split.classes, split.templates)
        plain = clip.zero_shot_head(split.classes, split.templates, prompted=False)
        right = None if split.labels is None else torch.tensor(split.labels, device=texts.device)
        shares |= text_shares(pruned, unpruned, texts, right, ks, quiet, plain)
    drift = own_distance(pruned, unpruned, torch.arange(len(pruned), device=pruned.device))
    arrays = {name: share.cpu().numpy() for name, share in shares.items()}
    return Retrieval(arrays, drift.cpu().numpy(), unpruned, pruned, None if texts is None else len(texts))


def image_shares(pruned: Tensor, unpruned: Tensor, ks: Sequence[int] = KS, quiet: bool = True) -> dict[str, Tensor]:
    """Image to image: queries `pruned` (n, E) against an index `unpruned` (n, E) of the same images.

    `image_recall@k`: fewer than k other images are nearer than the image itself. `image_neighbours@k`: of the k other
    images that the unpruned query finds, the share that the pruned one finds; `image_neighbours@k_reindexed`: the same
    share, had the index been built anew with the pruned tower.
    """
    ks = _below(ks, len(unpruned) - 1)
    if not ks:
        return {}
    own = torch.arange(len(unpruned), device=unpruned.device)
    before = nearest(unpruned, unpruned, max(ks), own, what="images, unpruned", quiet=quiet)
    after = nearest(pruned, unpruned, max(ks), own, what="images, pruned", quiet=quiet)
    anew = nearest(pruned, pruned, max(ks), own, what="images, reindexed", quiet=quiet)
    itself = own_distance(pruned, unpruned, own)
    shares = {f"image_recall@{k}": is_within(after, itself, k) for k in ks}
    shares |= {f"image_neighbours@{k}": shared(after, before, k) for k in ks}
    return shares | {f"image_neighbours@{k}_reindexed": shared(anew, before, k) for k in ks}


def text_shares(
    pruned: Tensor,
    unpruned: Tensor,
    texts: Tensor,
    right: Tensor | None = None,
    ks: Sequence[int] = KS,
    quiet: bool = True,
    plain: Tensor | None = None,
) -> dict[str, Tensor]:
    """Image to text: images (n, E) of both towers against `texts` (T, E), unpruned ones against `plain` if it is given.

    `text_recall@k`, `text_recall@k_unpruned`: fewer than k texts are nearer than the true one, or the nearest of the
    true ones, at the places `right`, (n,) or (n, C); only where these are known. `texts@k`: of the k texts that the
    unpruned image finds, the share that the pruned one finds.
    """
    ks = _below(ks, len(texts))
    if not ks:
        return {}
    shares, found = {}, []
    sides = ("", pruned, texts), ("_unpruned", unpruned, texts if plain is None else plain)
    for end, images, own in sides:
        found.append(nearest(images, own, max(ks), what=f"texts{end}", quiet=quiet))
        if right is not None:
            true = [own_distance(images, own, places) for places in right.reshape(len(right), -1).T]
            shares |= {f"text_recall@{k}{end}": is_within(found[-1], torch.stack(true).amin(0), k) for k in ks}
    return shares | {f"texts@{k}": shared(*found, k) for k in ks}


def text_to_image_shares(
    pruned: Tensor, unpruned: Tensor, texts: Tensor, right: Tensor, ks: Sequence[int] = KS, quiet: bool = True
) -> dict[str, Tensor]:
    """Text to image: `texts` (T, E) against an index of either tower's images (n, E).

    right: (n,) or (n, C), the places of each image's own texts; a text may stand twice in a row.

    `text_to_image_recall@k`, and the same of the unpruned index with `_unpruned`: fewer than k images are nearer than
    the nearest of those that have the text.
    """
    ks, shares = _below(ks, len(unpruned)), {}
    if not ks:
        return {}
    for end, images in (("", pruned), ("_unpruned", unpruned)):
        found = nearest(texts, images, max(ks), what=f"text to image{end}", quiet=quiet)
        best = torch.full((len(texts),), torch.inf, dtype=torch.float64, device=texts.device)
        for places in right.reshape(len(right), -1).T:
            best = best.scatter_reduce(0, places, own_distance(images, texts, places), "amin")
        shares |= {f"text_to_image_recall@{k}{end}": is_within(found, best, k) for k in ks}
    return shares


def _below(ks: Sequence[int], candidates: int) -> list[int]:
    """Those below the number of candidates: who looks at all of them finds everything."""
    return sorted({k for k in ks if k < candidates})


def _check_order(clip: Clip, split: ImageSplit, batch_size: int, index: Tensor) -> None:
    """Refuses an index in which images, taken evenly from the split, are not nearest to their own rows."""
    places = [i * len(split) // PROBES for i in range(PROBES)] if len(split) > PROBES else list(range(len(split)))
    plain = embed_unpruned(clip, split.take(places), batch_size).to(index.device)
    _check_rows(index, (len(split), plain.shape[1]), "index")
    own = torch.tensor(places, device=index.device)
    right = int(is_within(nearest(plain, index, 1), own_distance(plain, index, own), 1).sum())
    if right < 0.95 * len(plain):
        raise UserError(
            f"index must hold the unpruned embeddings of {split.task}/{split.split} in the order of its images, but of "
            f"{len(plain)} images taken evenly {right} are nearest to their own rows"
        )


def write_index(path: str, embeddings: Tensor) -> None:
    """Writes embeddings (n, E) as a float32 `.npy` file, whole or not at all.

    Raises:
        UserError: the place cannot be written to.
    """
    buffer = io.BytesIO()
    np.save(buffer, embeddings.float().cpu().numpy(), allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def read_index(path: str, split: ImageSplit, embed_dim: int) -> Tensor:
    """Embeddings (n, E) of a split's images, in its order, from a `.npy` file of floats; never unpickles.

    Raises:
        UserError: no such file, no sound `.npy`, other numbers than floats, another shape, rows that have no direction.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(read_bytes(path)), allow_pickle=False)
    except (OSError, ValueError, TypeError, SyntaxError, MemoryError, tokenize.TokenError) as error:  # of broken heads
        raise UserError(f"index {path}: cannot be read as .npy ({' '.join(str(error).split())[:160]})") from error
    if array.dtype.kind != "f":
        raise UserError(f"index {path}: must hold floats, but holds {array.dtype}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below, as not finite
        index = torch.from_numpy(array.astype(np.float32, copy=False))
    _check_rows(index, (len(split), embed_dim), f"index {path}:")
    return index


def _check_rows(index: Tensor, shape: tuple[int, int], name: str) -> None:
    """Raises `UserError` where an array is no index of (n, E) embeddings; `name` stands at the message's start."""
    found = tuple(index.shape)
    if found != shape:
        raise UserError(f"{name} must be of shape {shape}, one row an image and the tower's width, but is {found}")
    bad = (~index.isfinite().all(1) | (index == 0).all(1)).nonzero()[:, 0]
    if len(bad):
        raise UserError(f"{name} row {int(bad[0])} has no direction: it is not finite, or zero")


def main(argv: Sequence[str] | None = None) -> None:
    args = measuring_parser("retrieval", __doc__.split("\n\nShapes:")[0]).parse_args(argv)
    clip, split = pair_and_split(args)
    print_measured(args, "retrieval", clip, split, *retrieval_from(args, clip, split))


def measuring_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """The flags that retrieval and evaluation have in common."""
    parser = pruned_parser(stage, description, "val; of a folder or tars: all", batch_size=BATCH_SIZE)
    parser.add_argument("--index", help="search index: .npy of the images' unpruned embeddings; made if not there")
    return parser


def pair_and_split(args: argparse.Namespace) -> tuple[Clip, ImageSplit]:
    """The pair and the images that flags name; first of all, whether results can be written where they should go."""
    find_task(args.data)
    for place in (args.out, args.index):
        if place is not None:
            check_writable(os.path.dirname(resolve(place)))
    return create_pruned_clip_from(args), load_split_from(args)


def print_measured(
    args: argparse.Namespace, task: str, clip: Clip, split: ImageSplit, measured: Mapping, lines: list[tuple[str, str]]
) -> None:
    """Prints the row of what was measured, and a table of `lines` with what it costs below."""
    row = evaluation_row(args, task, clip, split, measured)
    where = f"on {args.data}/{split.split}"
    print_row(row, pruning_title(args, where), [*lines, macs_line(row), images_line(row)], args.out)


def retrieval_from(args: argparse.Namespace, clip: Clip, split: ImageSplit) -> tuple[dict, list[tuple[str, str]]]:
    """The figures of a command's row, and the lines of its table: of each figure all its k in one, then the drift.

    The index that `--index` names is read, or written where there is none yet.
    """
    known = args.index is not None and exists(args.index)
    index = read_index(args.index, split, clip.visual.num_classes) if known else None
    if not clip.has_text and (split.captions is not None or args.vocabulary):  # names of folders were not asked for
        write_line(f"{split.task}/{split.split}: {clip.name} has no text tower, so texts are left out")
    found = retrieval(clip, split, batch_size=args.batch_size, index=index)
    if args.index is not None and not known:
        write_index(args.index, found.unpruned)
    row, lines = found.row(), []
    for name, label in LABELS.items():
        figure, end = name.split("@k")
        ks = [k for k in KS if f"{figure}@{k}{end}" in row]
        if ks:
            values = ", ".join(f"{row[f'{figure}@{k}{end}']:.1f}" for k in ks)
            lines.append((f"{label}, k = {', '.join(map(str, ks))}", f"{values} %"))
    drift = ", ".join(f"{what} {row[f'drift_{what}']:.5f}" for what in ("mean", "p95", "max"))
    return row, [*lines, ("drift (1 - cosine to the unpruned embedding)", drift)]


if __name__ == "__main__":
    run_command(main)
