"""Whether a file does what the tower does that it was made from: choices first, then embeddings, then answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.data.image_split import ImageSplit
from patchrank.export import program_file
from patchrank.export.choices import Choices, Step
from patchrank.export.metadata import format_of, read_archive
from patchrank.export.onnx_format import laid_open
from patchrank.export.onnx_session import OnnxFile
from patchrank.export.pixels import to_pixels
from patchrank.models.clip import Clip
from patchrank.models.embed import split_batches, unit
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress

TOLERANCE = 1e-4  # embeddings (unit vectors) and probabilities may differ by this much where choices are the same
NEAR = 1e-4  # two scores are nearly tied within this share of the range of an image's scores


class CheckedFile:
    """A file whose choices are laid open.

    Attributes:
        about: what it says of itself.
    """

    def __init__(self, path: str, threads: int | None = None):
        self.path = path
        if format_of(path) == "pt2":
            self.about, self.program = read_archive(path), program_file.LaidOpen(program_file.load(path))
        else:
            self.about = OnnxFile(path, threads).about
            self.onnx = OnnxFile(path, threads, laid_open(path))
            there = {output.name for output in self.onnx.session.get_outputs()}
            for name in (name for choice in self.about["choices"] for name in choice):
                if name not in there:
                    raise UserError(f"{path}: says that it chooses by {name!r}, which it does not; try to export anew")

    def run(self, images: Tensor) -> tuple[dict[str, Tensor], list[Step]]:
        """Outputs by name, and what was ranked and chosen."""
        if self.about["format"] == "pt2":
            with torch.inference_mode():
                found = self.program.run(images)
            return dict(zip(self.about["outputs"], found)), self.program.steps
        found = {name: torch.from_numpy(value) for name, value in self.onnx.run(images.numpy()).items()}
        steps = [Step(found[scores], found[index]) for scores, index in self.about["choices"]]
        return {name: found[name] for name in self.about["outputs"]}, steps


@dataclass
class Seen:
    """What was seen of each image; lists of arrays (b, ...), one a batch.

    scores_apart: by how much scores differ at the most, as a share of their range, with the same choices before.
    unfit: by how much the tower's scores contradict the file's choices, in the same unit.
    same_kept: whether both keep the same set.
    embedding_apart, probability_apart: at most, with the file's choices forced on the tower.
    drift, drift_unpruned: 1 - cosine to the tower, free to choose, and to the same with nothing pruned.
    answer, answer_tower: classes.
    """

    scores_apart: list = field(default_factory=list)
    unfit: list = field(default_factory=list)
    same_kept: list = field(default_factory=list)
    embedding_apart: list = field(default_factory=list)
    probability_apart: list = field(default_factory=list)
    drift: list = field(default_factory=list)
    drift_unpruned: list = field(default_factory=list)
    answer: list = field(default_factory=list)
    answer_tower: list = field(default_factory=list)

    def add(self, **values: Tensor | np.ndarray) -> None:
        for name, value in values.items():
            getattr(self, name).append(np.asarray(value))

    def all(self, name: str) -> np.ndarray:
        return np.concatenate(getattr(self, name))


def compare(file: CheckedFile, clip: Clip, split: ImageSplit, batch_size: int, quiet: bool = False) -> dict:
    """Figures of a file beside its tower on the images of a split.

    Args:
        clip: what `check_same` found to be the one that the file was made from.
    """
    seen, about = Seen(), file.about
    answer = probabilities_of(clip, about)
    for given, images in _batches(file, clip, split, batch_size, quiet):
        outputs, steps = file.run(given)
        _compare_batch(seen, clip, images, outputs, steps, answer)
    found = _row(seen, file)
    if answer is not None and split.labels is not None and set(split.classes) <= set(about["classes"]):
        labels = np.asarray(split.labels)
        if list(split.classes) != about["classes"]:  # in another order, or with others beside
            labels = np.asarray([about["classes"].index(split.classes[label]) for label in labels])
        found["accuracy"] = 100.0 * float((seen.all("answer") == labels).mean())
        found["accuracy_tower"] = 100.0 * float((seen.all("answer_tower") == labels).mean())
    return found


def probabilities_of(clip: Clip, about: Mapping) -> Callable[[Tensor], Tensor] | None:
    """What makes the probabilities (B, C) of a tower's embeddings (B, E); None where a file names no classes."""
    if not about["classes"]:
        return None
    if not clip.has_text:
        return lambda raw: clip.classifier(raw).softmax(-1)
    head = clip.zero_shot_head(about["classes"], about["templates"] or ["{}"])
    return lambda raw: (clip.logit_scale.exp() * unit(raw) @ head.T).softmax(-1)


@torch.inference_mode()
def _compare_batch(
    seen: Seen,
    clip: Clip,
    images: Tensor,
    outputs: Mapping[str, Tensor],
    steps: list[Step],
    answer: Callable[[Tensor], Tensor] | None,
) -> None:
    tower, embedding = clip.visual, outputs["embedding"].float()
    free = tower.forward_pruned(images, mapped=False)
    with Choices([step.index for step in steps]) as forced:
        same = tower.forward_pruned(images, mapped=False)
    seen.add(embedding_apart=(unit(same.embedding) - embedding).abs().amax(1))
    for name, whole in (("drift", free.embedding), ("drift_unpruned", tower.forward_whole(images))):
        seen.add(**{name: 1 - F.cosine_similarity(whole.double(), embedding.double(), dim=-1)})
    if "kept" in outputs:
        seen.add(same_kept=(outputs["kept"].sort(1).values == free.kept.sort(1).values).all(1))
    apart, unfit = _judge(steps, forced, len(images))
    seen.add(scores_apart=apart, unfit=unfit)
    if answer is not None:
        seen.add(probability_apart=_probability_apart(outputs["probabilities"], answer(same.embedding)))
        seen.add(answer=outputs["probabilities"].argmax(1), answer_tower=answer(free.embedding).argmax(1))


def _probability_apart(theirs: Tensor, ours: Tensor) -> Tensor:
    """By how much probabilities (B, C) differ at the most, (B,); 1 where the file has another number of classes."""
    return (theirs - ours).abs().amax(1) if theirs.shape == ours.shape else torch.ones(len(ours))


def _judge(steps: list[Step], forced: Choices, count: int) -> tuple[Tensor, Tensor]:
    """Of each image, by how much scores differ and contradict what was chosen, as shares of their range."""
    apart, unfit = torch.zeros(count), torch.zeros(count)
    for theirs, ours, descending in zip(steps, forced.steps, forced.descending):
        if not ours.scores.is_floating_point():  # places that are put in order, not scores
            continue
        scores = ours.scores.float()
        finite = scores.isfinite()
        low, high = (scores.where(finite, end).flatten(1) for end in (torch.inf, -torch.inf))
        spread = (high.amax(1) - low.amin(1)).clamp(min=1e-12)
        other = theirs.scores.float().view_as(scores)
        far = torch.where(finite, (scores - other).abs(), 0.0).flatten(1).amax(1)
        apart = torch.maximum(apart, far / spread)
        unfit = torch.maximum(unfit, theirs._replace(index=ours.index).unfit(scores, descending) / spread)
    return apart, unfit


def _row(seen: Seen, file: CheckedFile) -> dict:
    """Figures of all images."""
    about, count = file.about, len(seen.all("drift"))
    row: dict[str, Any] = {"n_images": count, "bytes": os.path.getsize(file.path)}
    apart, unfit = float(seen.all("scores_apart").max()), seen.all("unfit")
    row["embedding_apart"] = float(seen.all("embedding_apart").max())
    if seen.same_kept:
        others = ~seen.all("same_kept")
        row |= {"scores_apart": apart, "same_kept": int(count - others.sum())}
        if about["precision"] == "float32":  # int8 is near nothing
            row |= {"near_ties": int((others & (unfit <= NEAR)).sum()), "contradictions": int((unfit > NEAR).sum())}
    if seen.answer:
        row["probability_apart"] = float(seen.all("probability_apart").max())
        row["same_class"] = int((seen.all("answer") == seen.all("answer_tower")).sum())
    row |= {name: float(seen.all(name).mean()) for name in ("drift", "drift_unpruned")}
    if about["precision"] == "float32":
        apart = max(row["embedding_apart"], row.get("probability_apart", 0.0))
        row["passed"] = apart <= TOLERANCE and not row.get("contradictions")
    return row


def _batches(
    file: CheckedFile, clip: Clip, split: ImageSplit, batch_size: int, quiet: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the file takes them, and as the tower does."""
    settings = file.about["input"]
    if settings["dtype"] == "float32":
        yield from ((images, images) for images, _ in split_batches(clip, split, batch_size, "check", quiet))
        return

    def pixels(image: Any) -> Tensor:
        return torch.from_numpy(to_pixels(image.convert("RGB"), settings).copy())

    with progress(total=len(split), desc=f"check {split.task}/{split.split}", unit="image", disable=quiet) as bar:
        for given, _ in split.batches(pixels, batch_size):
            yield given, clip.normalize(given.permute(0, 3, 1, 2).float() / 255)
            bar.update(len(given))
