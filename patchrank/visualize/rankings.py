"""Which patches each ranker keeps of given images, and what the model answers with those alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchrank.config import DEFAULTS
from patchrank.golden.scores import METRICS, score_images
from patchrank.layers.predictors import load_predictor
from patchrank.layers.reducers import REDUCERS
from patchrank.layers.schedule import num_kept
from patchrank.models.answers import known_labels
from patchrank.models.clip import Clip
from patchrank.models.embed import embed, unit
from patchrank.models.pruning_cfg import check_merging
from patchrank.utils.errors import UserError, near
from patchrank.utils.plain import plain
from patchrank.utils.progress import progress
from patchrank.visualize.pictures import Pictures

KEEP_RATES = (0.8, 0.6, 0.4)


class Kept(NamedTuple):
    """What is left of B images, and what the model answers.

    places: (B, K), of the patches that survive. answers: (B,), places in the class list. probabilities: (B,), of those.
    source: (B, N), which of the survivors each patch lives in, -1 where it was dropped; None where patches never merge.
    drift: (B,), 1 - cosine to the embedding of the whole image, where the model answers nothing.
    """

    places: np.ndarray
    answers: np.ndarray | None
    probabilities: np.ndarray | None
    source: np.ndarray | None = None
    drift: np.ndarray | None = None


@dataclass(frozen=True)
class Rankings:
    """All that a picture shows.

    pixels: (B, S, S, 3) uint8, the crops that the model sees. rows: ranker -> one `Kept` for each keep rate.
    fitted_to: the metric that the predictor's file says it was fitted to. about: one line on the model.
    """

    pictures: Pictures
    pixels: np.ndarray
    grid: tuple[int, int]
    keep_rates: tuple[float, ...]
    unpruned: Kept
    rows: dict[str, list[Kept]]
    about: str
    golden: dict[str, int]
    fitted_to: str | None = None


def default_rankers(clip: Clip, pictures: Pictures) -> list[str]:
    """The paper's rows (figures 3 and 4): without `label` where no labels are known, without a predictor to hand.

    Of a model that answers nothing the golden scores are those of the embedding alone.
    """
    if not clip.has_text and clip.classifier is None:
        rankers = ["preservation"]
    else:
        rankers = [name for name in METRICS if name != "label" or known_labels(clip, pictures) is not None]
    predictor = ["predictor"] if clip.visual.pruning.predictor_path else []
    return rankers + predictor + ["cls_attention", "random"]


def check_rankers(rankers: Sequence[str], labelled: bool, answers: bool = True) -> None:
    """Raises `UserError` for a ranker that does not exist, or one that needs labels or answers that are not there."""
    known = [*METRICS, *(name for name in REDUCERS if name != "golden")]  # golden is the metrics' own reducer
    for name in rankers:
        if name not in known:
            raise UserError(f"ranker {name!r} does not exist; {near(name, known)}")
        if name in ("label", "confidence") and not answers:
            raise UserError(
                f"ranker {name!r} needs a model that answers: a text tower or a classifier; try preservation"
            )
        if name == "label" and not labelled:
            raise UserError("ranker 'label' needs the images' labels, and they have none")


def _named_by_classifier(clip: Clip, pictures: Pictures) -> Pictures:
    """Pictures whose classes are those of the model's own classifier, by numbers where nobody named them."""
    labels = known_labels(clip, pictures)
    names = clip.class_names or tuple(f"class {place}" for place in range(clip.classifier.out_features))
    return replace(pictures, classes=names, labels=None if labels is None else labels.tolist())


@torch.inference_mode()
def kept_by(
    clip: Clip,
    images: Tensor,
    head: Tensor | None,
    ranker: str,
    keep_rates: Sequence[float] = KEEP_RATES,
    locations: Sequence[int] = DEFAULTS.pruning.locations,
    seed: int = 0,
    scores: Tensor | None = None,
    leftovers: str | None = None,
    unpruned: Tensor | None = None,
    **merging,
) -> list[Kept]:
    """What one ranker keeps of images at each keep rate; `clip` stays as it is.

    Args:
        images: (B, 3, H, W), normalised.
        head: class embeddings (C, E), unit vectors; None without a text tower.
        ranker: a reducer, or one of `METRICS` together with its golden scores.
        seed: of the ranker `random`.
        scores: (B, N), high = keep, to rank by instead of the reducer's own.
        leftovers: what becomes of patches that a ranker does not keep: `drop`, or `merge`. Nothing is said of it to a
            reducer that merges by a rule of its own.
        unpruned: (B, E), embeddings of the whole images, to tell the drift from.
        **merging: `taper`, `align`, `metric`, `protection` and `drop_share`, as `set_pruning` takes them.

    Raises:
        UserError: as `set_pruning`.
    """
    reducer = "golden" if ranker in METRICS else ranker
    pruning = {"reducer": reducer, "locations": locations, "drop_counts": None, "budget": None, **merging}
    pruning |= {"leftovers": None if REDUCERS[reducer].merges else leftovers}
    found = []
    for keep_rate in keep_rates:
        with clip.applied(keep_rate=keep_rate, seed=seed, **pruning):
            embeddings, left = embed(clip, [(images, range(len(images)))], scores, with_unpruned=False, raw=True)
        logits, drift = _logits(clip, embeddings["pruned"], head), None
        best = (None, None) if logits is None else logits.softmax(-1).max(-1)[::-1]
        if logits is None and unpruned is not None:
            drift = 1 - (unit(embeddings["pruned"]) * unit(unpruned)).sum(-1)
        arrays = (None if x is None else x.cpu().numpy() for x in (left.kept, *best, left.source, drift))
        found.append(Kept(*arrays))
    return found


def _logits(clip: Clip, embeddings: Tensor, head: Tensor | None) -> Tensor | None:
    """Logits (B, C) of embeddings (B, E): by class embeddings, or by the model's own classifier; None of neither."""
    if head is not None:
        return clip.logit_scale.exp() * unit(embeddings) @ head.T
    return None if clip.classifier is None else clip.classifier(embeddings)


def golden_scores(
    clip: Clip,
    images: Tensor,
    head: Tensor | None,
    labels: Tensor | None,
    metrics: Sequence[str],
    quiet: bool,
    **golden: int,
) -> dict[str, Tensor]:
    """Golden scores (B, N) of images by each metric, image by image, since a large grid takes a minute for one."""
    parts = []
    for i in progress(range(len(images)), desc="golden scores", unit="image", disable=quiet):
        label = None if labels is None else labels[i : i + 1]
        how = golden | {"metrics": metrics, "logit_scale": clip.logit_scale.exp().item()}
        how |= {"classifier": clip.classifier} if head is None and clip.classifier is not None else {}
        parts.append(score_images(clip.visual, images[i : i + 1], head, label, **how).scores)
    return dict(zip(metrics, torch.cat(parts).float().unbind(1)))


def rank_pictures(
    clip: Clip,
    pictures: Pictures,
    rankers: Sequence[str] | None = None,
    keep_rates: Sequence[float] = KEEP_RATES,
    locations: Sequence[int] = DEFAULTS.pruning.locations,
    window: int = DEFAULTS.golden.window,
    stride: int = DEFAULTS.golden.stride,
    remove_at: int = DEFAULTS.golden.remove_at,
    seed: int = 0,
    quiet: bool = True,
    leftovers: str | None = None,
    **merging,
) -> Rankings:
    """What every ranker keeps of every image.

    Args:
        rankers: metrics (golden scores of these very images: oracles) and reducers; None for the paper's.
        locations: layers, from 1, before which patches leave, or inside of which they merge.
        window, stride, remove_at: of golden scores.
        leftovers, **merging: as in `kept_by`.

    Raises:
        UserError: an unknown ranker, one that lacks what it needs, or an impossible setting.
    """
    keep_rates, locations = plain(tuple(keep_rates)), plain(tuple(locations))
    golden = {"window": plain(window), "stride": plain(stride), "remove_at": plain(remove_at)}
    rankers = default_rankers(clip, pictures) if rankers is None else list(dict.fromkeys(rankers))
    check_rankers(rankers, known_labels(clip, pictures) is not None, clip.has_text or clip.classifier is not None)
    check_merging(merging, ["golden" if name in METRICS else name for name in rankers], leftovers)
    for keep_rate in keep_rates:  # before minutes are spent on golden scores
        num_kept(clip.visual.num_patches, keep_rate)
    transform, device = clip.transform(), clip.logit_scale.device
    images = torch.stack([transform(image) for image in pictures.images]).to(device)
    if not clip.has_text and clip.classifier is not None:
        pictures = _named_by_classifier(clip, pictures)
    head = clip.zero_shot_head(pictures.classes, pictures.templates) if clip.has_text else None
    labels = None if pictures.labels is None else torch.tensor(pictures.labels, device=device)
    with clip.applied():  # the pair as it came
        clip.set_prompts(None)
        whole_head = clip.zero_shot_head(pictures.classes, pictures.templates) if clip.has_text else None
        whole = kept_by(clip, images, whole_head, "golden", [1.0], locations)[0]
    unpruned = None if whole.answers is not None else clip.visual.forward_whole(images)
    pruning = {"keep_rates": keep_rates, "locations": locations, "seed": seed, "leftovers": leftovers, **merging}
    pruning["unpruned"] = unpruned
    # what takes no time goes first, so that it also fails first
    bar = progress([name for name in rankers if name not in METRICS], desc="rank", unit="row", disable=quiet, delay=1)
    rows = {name: kept_by(clip, images, head, name, **pruning) for name in bar}
    if metrics := [name for name in rankers if name in METRICS]:
        scores = golden_scores(clip, images, head, labels, metrics, quiet, **golden)
        rows |= {name: kept_by(clip, images, head, name, scores=scores[name], **pruning) for name in metrics}
    predictor, layers = clip.visual.pruning.predictor_path, "layers" if len(locations) > 1 else "layer"
    repaired = " with a repair" if clip.visual.pruning.repair_path else ""
    return Rankings(
        pictures,
        pixels=clip.to_pixels(images),
        grid=clip.visual.patch_embed.grid_size,
        keep_rates=tuple(keep_rates),
        unpruned=whole,
        rows={name: rows[name] for name in rankers},
        about=f"{clip.name}{repaired}, patches leave at {layers} {', '.join(map(str, locations))}",
        golden=golden,
        fitted_to=None if predictor is None else load_predictor(predictor)[1]["metric"],
    )
