"""A file beside its tower: what passes, what fails, and what is told of other weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_exports import NAME, SETTINGS, create_tower, flags, pair_of, write_pt2

from patchrank.data.dataset_factory import load_split
from patchrank.export.check import CheckedFile, compare
from patchrank.export.choices import Choices
from patchrank.export.description import check_same, describe, fingerprints
from patchrank.export.program import ExportedTower
from patchrank.export.towers import create_pair
from patchrank.export.write import create_head
from patchrank.layers.predictors import Prior
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError

COUNT, PATCHES, KEPT = 6, 16, 8
SMALL = {"depth": 1, "locations": (1,)}


@pytest.fixture(scope="module")
def split():
    return load_split("digits", "val", COUNT)


class Pretended:
    """A file in Python: the graph before it is traced, with what it gives changed.

    Args:
        change: of outputs and steps.
    """

    path = __file__

    def __init__(self, clip, change=lambda outputs, steps: None, head=None, uint8=False, **about):
        self.module, self.change = ExportedTower(clip, head, uint8).eval(), change
        self.about = describe(clip, self.module, "pt2") | about

    @torch.inference_mode()
    def run(self, images):
        with Choices() as noted:
            outputs = dict(zip(self.module.outputs, self.module(images)))
        self.change(outputs, noted.steps)
        return outputs, noted.steps


def naming(clip, classes, change=lambda outputs, steps: None):
    """A file in Python that names classes."""
    asked = {"classes": list(classes), "templates": ["a {}."]}
    return Pretended(clip, change, create_head(clip, **asked), **asked)


def compared(file, clip, split):
    return compare(file, clip, split, batch_size=4, quiet=True)


@pytest.fixture(scope="module")
def with_text():
    """A small tower with the text tower that ships."""
    return Clip("tiny", create_tower(**SMALL), create_pair(flags(), NAME, True, {}).text).eval()


@pytest.fixture(scope="module")
def exported(with_text, split, tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "tower.pt2"
    asked = {"classes": list(split.classes), "templates": ["a {}."]}
    weights = fingerprints(with_text, True)
    return write_pt2(path, with_text, create_head(with_text, **asked), uint8=True, **asked, weights=weights)


def test_a_file_that_is_true_passes(exported, with_text, split):
    """One that takes pixels, and names the classes of the split."""
    file = CheckedFile(exported)
    check_same(file.about, with_text, exported)
    row = compared(file, with_text, split)
    assert row["passed"] and row["n_images"] == row["same_kept"] == row["same_class"] == COUNT
    assert row["near_ties"] == row["contradictions"] == 0 and row["scores_apart"] < 1e-5
    assert row["embedding_apart"] < 1e-6 and abs(row["drift"]) < 1e-9 < 1e-4 < row["drift_unpruned"]
    assert row["accuracy"] == row["accuracy_tower"]
    assert row["bytes"] > 10_000


def test_accuracy_is_of_the_splits_own_classes_alone(with_text, split):
    file = naming(with_text, split.classes)
    for other in (replace(split, classes=(*split.classes[1:], "ten")), replace(split, labels=None)):
        row = compared(file, with_text, other.first(2))
        assert "accuracy" not in row and "accuracy_tower" not in row and row["same_class"] == 2


def test_accuracy_counts_the_files_own_answers(with_text, split):
    def answer_zero(outputs, steps):
        outputs["probabilities"] = F.one_hot(torch.zeros(len(outputs["embedding"]), dtype=torch.long), 10).float()

    row = compared(naming(with_text, split.classes, answer_zero), with_text, split)
    assert row["accuracy"] == pytest.approx(100 * split.labels.count(0) / COUNT)
    right = compared(naming(with_text, split.classes), with_text, split)
    assert row["accuracy_tower"] == right["accuracy"] and right["same_class"] == COUNT
    assert row["same_class"] < COUNT


def test_accuracy_goes_by_the_names_of_classes(with_text, split):
    usual, turned, more = (
        compared(naming(with_text, classes), with_text, split)
        for classes in (split.classes, split.classes[::-1], [*split.classes[::-1], "ten"])
    )
    assert turned["accuracy"] == usual["accuracy"] and turned["passed"] and more["passed"]
    assert more["accuracy"] == pytest.approx(usual["accuracy"], abs=100 / COUNT + 1e-9)


def test_classes_of_one_name_are_told_apart_by_their_places(with_text, split):
    def answer_rightly(outputs, steps):
        outputs["probabilities"] = F.one_hot(torch.tensor(labels.pop(0)), 10).float()

    labels = [split.labels[:4], split.labels[4:]]
    alike = replace(split, classes=("digit",) * 10)
    assert compared(naming(with_text, alike.classes, answer_rightly), with_text, alike)["accuracy"] == 100


def negate(head, classes):
    head.vectors.neg_()


def rescale(head, classes):
    head.scale *= 1.05


@pytest.mark.parametrize("change", [negate, rescale, lambda head, classes: classes.reverse()])
def test_probabilities_of_something_else_do_not_pass(change, with_text, split):
    file = naming(with_text, split.classes)
    change(file.module.classes, file.about["classes"])
    row = compared(file, with_text, split)
    assert not row["passed"] and row["probability_apart"] > 1e-4 and row["embedding_apart"] < 1e-6


@pytest.mark.parametrize("change", [lambda classes: classes.append("ten"), lambda classes: classes.pop()])
def test_a_file_that_names_another_number_of_classes_than_it_gives_does_not_pass(change, with_text, split):
    file = naming(with_text, split.classes)
    change(file.about["classes"])
    row = compared(file, with_text, split)
    assert not row["passed"] and row["probability_apart"] == 1


@pytest.mark.parametrize("reducer", ["tome", "evit", "mlp_shift", "diffrate", "rank_merge"])
def test_every_way_to_choose_is_laid_beside_the_towers(reducer, split):
    seen, clip = [], pair_of(create_tower(reducer, depth=3))  # in the last layer nothing has to leave any more
    file = Pretended(clip, lambda outputs, steps: seen.append(len(steps)))
    row = compared(file, clip, split)
    assert min(seen) > 0
    assert row["passed"] and row["same_kept"] == COUNT and row["scores_apart"] == row["embedding_apart"] == 0


def test_a_tower_with_nothing_pruned_is_compared_by_its_embedding(split):
    clip = pair_of(create_tower(keep_rate=1.0, **SMALL))
    row = compared(Pretended(clip), clip, split)
    assert row["passed"] and "same_kept" not in row and "contradictions" not in row


def ranking(scores):
    """A pair whose patches have these scores, in whatever image."""
    clip = pair_of(create_tower("prior", **SMALL))
    clip.visual.set_pruning(Prior.from_scores(scores, 32, (4, 4)))
    return clip


def scores_with(gap, places):
    """Scores from 15 to 0, two of them `gap` of the range apart, around the mean of both."""
    scores = torch.arange(PATCHES - 1.0, -1, -1)
    scores[list(places)] = scores[list(places)].mean() + gap * (PATCHES - 1) * torch.tensor([0.5, -0.5])
    return scores


LAST, BORDER = (3, 4), (KEPT - 1, KEPT)  # two that both stay, and one that stays with one that leaves


@pytest.mark.parametrize(
    "gap, places, same, near, contradicted",
    [
        (4e-5, BORDER, 0, COUNT, 0),
        (4e-4, BORDER, 0, 0, COUNT),
        (4e-5, LAST, COUNT, 0, 0),
        (4e-4, LAST, COUNT, 0, COUNT),
    ],
)
def test_near_ties_pass_and_choices_that_scores_contradict_fail(gap, places, same, near, contradicted, split):
    row = compared(Pretended(ranking(scores_with(-gap, places))), ranking(scores_with(gap, places)), split)
    assert (row["same_kept"], row["near_ties"], row["contradictions"]) == (same, near, contradicted)
    assert row["embedding_apart"] < 1e-6  # with the same choices
    assert row["passed"] == (contradicted == 0) and row["scores_apart"] == pytest.approx(gap, rel=0.05)


def off(by):
    def change(outputs, steps):
        outputs["embedding"] = outputs["embedding"] + by * F.one_hot(torch.tensor(0), outputs["embedding"].shape[1])

    return change


@pytest.mark.parametrize("by, passed", [(5e-5, True), (2e-4, False), (1e-3, False), (float("nan"), False)])
def test_embeddings_may_be_apart_by_rounding_alone(by, passed, split):
    clip = pair_of(create_tower("center", **SMALL))
    row = compared(Pretended(clip, off(by)), clip, split)
    assert row["passed"] is passed and row["embedding_apart"] == pytest.approx(by, rel=0.01, nan_ok=True)


def test_of_a_file_in_int8_the_figures_are_told_without_a_limit(split):
    clip = pair_of(create_tower("center", **SMALL))
    row = compared(Pretended(clip, off(1e-2), precision="int8"), clip, split)
    assert "passed" not in row and row["embedding_apart"] > 5e-3 and row["drift"] > 1e-6
    assert "contradictions" not in row and "near_ties" not in row


def test_a_file_that_makes_other_choices_is_told(split):
    clip = pair_of(create_tower("tome", depth=3))
    for change in (lambda outputs, steps: steps.pop(), lambda outputs, steps: steps.append(steps[0])):
        with pytest.raises(UserError, match="the file does not choose as this tower does, .*; try to export anew"):
            compared(Pretended(clip, change), clip, split)


WEIGHTS = {
    "tower": ("--checkpoint", lambda clip: clip.visual.norm.weight),
    "ranker": ("--predictor", lambda clip: next(clip.visual.pruner.reducer.parameters())),
    "repair": ("--repair", lambda clip: clip.visual.repair.bias),
    "prompts": ("--prompts", lambda clip: next(clip.prompts.parameters())),
    "text": ("--checkpoint", lambda clip: clip.text.ln_final.weight),
}


@torch.no_grad()
@pytest.mark.parametrize("part", WEIGHTS)
def test_a_file_of_other_weights_is_refused_by_the_part_and_its_flag(part, files):
    flag, weight = WEIGHTS[part]
    kinds = {"checkpoint", "predictor", "prompts" if part == "prompts" else "repair"}
    classes = ["one"] if part in ("prompts", "text") else []
    clip = create_pair(flags(**{kind: files[kind] for kind in kinds}), NAME, bool(classes), SETTINGS)
    about = describe(clip, ExportedTower(clip), "onnx", classes)
    check_same(about, clip, "some.onnx")
    weight(clip).add_(1)
    told = f"^some.onnx: was made with {part} weights [0-9a-f]{{12}}, but here they are [0-9a-f]{{12}}; try {flag} with"
    with pytest.raises(UserError, match=told) as caught:
        check_same(about, clip, "some.onnx")
    assert "\n" not in str(caught.value)


def test_a_part_that_is_missing_or_too_many_is_refused(files):
    repaired, plain = (
        create_pair(
            flags(checkpoint=files["checkpoint"], predictor=files["predictor"], repair=path), NAME, False, SETTINGS
        )
        for path in (files["repair"], None)
    )
    cures = [
        "repair weights [0-9a-f]{12}, but here they are none; try --repair with the file that it was exported with"
    ]
    cures += ["repair weights none, but here they are [0-9a-f]{12}; try it without --repair"]
    for one, other, told in zip((repaired, plain), (plain, repaired), cures):
        with pytest.raises(UserError, match=f"{told}$"):
            check_same(describe(one, ExportedTower(one), "onnx"), other, "some.onnx")


@pytest.mark.parametrize("part", ["tower", "ranker", "repair", None])
def test_a_file_without_fingerprints_or_without_one_is_refused(part, files):
    kinds = ("checkpoint", "predictor", "repair")
    clip = create_pair(flags(**{kind: files[kind] for kind in kinds}), NAME, False, SETTINGS)
    about = describe(clip, ExportedTower(clip), "onnx")
    about["weights"] = {key: sha for key, sha in about["weights"].items() if part not in (key, None)}
    told = f"^some.onnx: was made with {part or 'tower'} weights none, but here they are [0-9a-f]{{12}}; try it without"
    with pytest.raises(UserError, match=told):
        check_same(about, clip, "some.onnx")
