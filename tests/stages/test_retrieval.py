import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import patchrank
from patchrank.data.dataset_factory import load_split
from patchrank.layers.prompts import Prompts
from patchrank.models.embed import embed_unpruned, evaluate
from patchrank.retrieval import image_shares, read_index, retrieval, text_shares, text_to_image_shares, write_index
from patchrank.utils.errors import UserError
from patchrank.utils.nearest import is_within, nearest, own_distance, shared

N = 40


def at(*degrees):
    """Unit vectors (n, 2) in these directions."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1).float()


def points(n, seed=0, width=6):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def split(clip):
    """The first validation images, decoded once."""
    return load_split("digits", "val", N).loaded(clip.transform(), 1 << 30)


def test_nearest_by_angle_whatever_the_length():
    index = at(0, 40, 90, 180) * torch.tensor([[1.0], [5.0], [0.1], [3.0]])
    found = nearest(at(30, 100), index, 3)
    assert found.place.tolist() == [[1, 0, 2], [2, 1, 3]]
    expected = torch.tensor([[10, 30, 60], [10, 60, 80]]).double().deg2rad().cos()
    torch.testing.assert_close(found.cosine, expected, rtol=0, atol=1e-7)


def test_equals_stand_in_the_order_of_the_index():
    index = at(50, 0, 50, 0, 50)
    assert nearest(at(50), index, 4, chunk=2).place.tolist() == [[0, 2, 4, 1]]
    assert nearest(at(50), 3 * index.flip(1), 2).place.tolist() == [[0, 2]]
    assert nearest(at(50), index, 3, own=torch.tensor([2])).place.tolist() == [[0, 4, 1]]


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
def test_chunks_change_nothing(chunk):
    queries, index = points(23), torch.cat([points(30, 1), points(30, 1), points(7, 2)])
    own = torch.arange(23) * 2
    found = nearest(queries, index, 45, own, chunk)
    cosine = F.normalize(queries.double(), dim=-1) @ F.normalize(index.double(), dim=-1).T
    cosine = ((cosine * 2**30).round() / 2**30).scatter(1, own[:, None], -2)
    expected = cosine.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.place, expected.indices[:, :45]) and torch.equal(found.cosine, expected.values[:, :45])


@pytest.mark.parametrize("k, own, most", [(0, None, 4), (5, None, 4), (4, torch.tensor([1]), 3)])
def test_more_than_there_are_cannot_be_found(k, own, most):
    with pytest.raises(UserError, match=rf"k must lie in 1\.\.{most}, the number of candidates, but is {k}"):
        nearest(at(0), at(0, 1, 2, 3), k, own)


def test_what_is_as_near_does_not_count_against_the_right_one():
    found = nearest(at(0, 0), at(10, -10, 10, 30), 4)
    right = own_distance(at(0, 0), at(10, -10, 10, 30), torch.tensor([2, 3]))
    assert [is_within(found, right, k).tolist() for k in (1, 3, 4)] == [[True, False], [True, False], [True, True]]
    torch.testing.assert_close(right, 1 - torch.tensor([10.0, 30.0]).double().deg2rad().cos(), rtol=0, atol=1e-7)


def test_shared_counts_what_both_found_in_any_order():
    ours, theirs = nearest(at(0, 90), at(0, 10, 90, 100), 3), nearest(at(9, 0), at(0, 10, 90, 100), 3)
    assert ours.place.tolist() == [[0, 1, 2], [2, 3, 1]] and theirs.place.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert [shared(ours, theirs, k).tolist() for k in (1, 2)] == [[0, 0], [1, 0]]
    torch.testing.assert_close(shared(ours, theirs, 3), torch.tensor([1, 2 / 3]), check_dtype=False)


def test_images_that_drifted():
    unpruned = at(0, 20, 60, 130)
    shares = image_shares(at(5, 50, 150, 130), unpruned, (1, 2, 3))  # the second and third went to their neighbours
    assert {name: share.tolist() for name, share in shares.items()} == {
        "image_recall@1": [True, False, False, True],
        "image_recall@2": [True, True, True, True],
        "image_neighbours@1": [1, 0, 0, 1],
        "image_neighbours@2": [1, 1, 0.5, 1],
        "image_neighbours@1_reindexed": [1, 1, 0, 1],
        "image_neighbours@2_reindexed": [0.5, 0.5, 0.5, 1],
    }


def test_an_image_that_is_there_twice_is_found_twice():
    unpruned = points(5).repeat(2, 1)
    shares = image_shares(unpruned, unpruned.clone(), (1, 2))
    assert all((share == 1).all() for share in shares.values())


def test_texts_of_images():
    texts, right = at(0, 40, 90), torch.tensor([0, 1, 2, 0])
    unpruned, pruned = at(1, 41, 91, 50), at(25, 41, 91, 50)
    shares = {name: share.tolist() for name, share in text_shares(pruned, unpruned, texts, right, (1, 2, 3)).items()}
    assert shares == {
        "text_recall@1": [False, True, True, False],
        "text_recall@2": [True, True, True, False],
        "text_recall@1_unpruned": [True, True, True, False],
        "text_recall@2_unpruned": [True, True, True, False],
        "texts@1": [0, 1, 1, 1],
        "texts@2": [1, 1, 1, 1],
    }
    assert set(text_shares(pruned, unpruned, texts, None, (1,))) == {"texts@1"}
    assert text_shares(pruned, unpruned, texts, right, (3, 9)) == {}


def test_a_text_finds_the_nearest_of_its_images():
    texts, right = at(0, 90), torch.tensor([0, 1, 0, 1])
    unpruned, pruned = at(70, 80, 5, 120), at(70, 50, 60, 160)
    shares = text_to_image_shares(pruned, unpruned, texts, right, (1, 2, 4))
    assert {name: share.tolist() for name, share in shares.items()} == {
        "text_to_image_recall@1": [False, False],
        "text_to_image_recall@2": [True, False],
        "text_to_image_recall@1_unpruned": [True, True],
        "text_to_image_recall@2_unpruned": [True, True],
    }


def test_nothing_pruned_changes_nothing(clip, split):
    found = retrieval(clip, split, quiet=True)
    row = found.row()
    figures = {name: value for name, value in row.items() if "recall" not in name or name.startswith("image")}
    assert figures == {
        **{f"image_{what}@{k}": 100.0 for what in ("recall", "neighbours") for k in (1, 5, 10)},
        **{f"image_neighbours@{k}_reindexed": 100.0 for k in (1, 5, 10)},
        **{f"texts@{k}": 100.0 for k in (1, 5)},  # 10 of 10 texts would tell nothing
        **{f"drift_{what}": 0.0 for what in ("mean", "p95", "max")},
        **{"n_images": N, "n_texts": 10},
    }
    assert row["text_recall@1"] == row["text_recall@1_unpruned"] == evaluate(clip, split, quiet=True).row()["accuracy"]
    torch.testing.assert_close(found.unpruned, F.normalize(embed_unpruned(clip, split), dim=-1), atol=1e-6, rtol=0)


def test_pruning_drifts_as_far_as_evaluation_says(split):
    clip = patchrank.create_clip("patchrank_clip_digits", keep_rate=0.3, reducer="random")
    found, evaluated = retrieval(clip, split, quiet=True), evaluate(clip, split, quiet=True)
    row, classified = found.row(), evaluated.row()
    np.testing.assert_allclose(found.drift, 1 - evaluated.cosine["pruned"], atol=1e-6)
    assert row["drift_mean"] < row["drift_p95"] < row["drift_max"] == found.drift.max()
    assert row["text_recall@1"] == classified["accuracy"] < row["text_recall@1_unpruned"]
    assert row["texts@1"] == classified["agreement"]
    assert row["image_recall@1"] < row["image_recall@10"] <= 100
    assert all(share.shape == (N,) for share in found.shares.values())


def test_captions_count_once(clip, split):
    captions = [(f"a photo of the number {split.classes[label]}.",) for label in split.labels]
    clip.visual.set_pruning(keep_rate=0.6)
    row = retrieval(clip, replace(split, captions=captions), ks=(1, 20), quiet=True).row()
    classified = retrieval(clip, replace(split, templates=("a photo of the number {}.",)), ks=(1, 20), quiet=True).row()
    extra = {f"text_to_image_recall@{k}{end}" for k in (1, 20) for end in ("", "_unpruned")}
    assert set(row) - set(classified) == extra and row["n_texts"] == 10
    assert {name: row[name] for name in classified} == pytest.approx(classified)
    assert row["text_to_image_recall@20"] == 100


def test_images_without_labels_or_names(clip, split):
    clip.visual.set_pruning(keep_rate=0.6)
    unlabelled = retrieval(clip, replace(split, labels=None), quiet=True).row()
    nameless = retrieval(clip, replace(split, labels=None, classes=()), quiet=True).row()
    assert {"texts@1", "texts@5", "n_texts"} == set(unlabelled) - set(nameless)
    assert not any("text" in name for name in nameless) and nameless["n_images"] == N
    few = retrieval(clip, replace(split, classes=()).first(2), quiet=True).row()
    assert set(few) == {"drift_mean", "drift_p95", "drift_max", "n_images"}


def test_an_index_that_was_saved_gives_the_same_row(clip, split, tmp_path):
    path = str(tmp_path / "new" / "index.npy")
    for keep_rate in (1.0, 0.6):
        clip.visual.set_pruning(keep_rate=keep_rate)
        fresh = retrieval(clip, split, quiet=True)
        write_index(path, fresh.unpruned)
        index = read_index(path, split, 64)
        assert torch.equal(index, fresh.unpruned)
        assert retrieval(clip, split, quiet=True, index=index).row() == fresh.row()
    np.save(path, 8 * index.numpy().astype(">f8"))  # another length, type and byte order, the same directions
    assert retrieval(clip, split, quiet=True, index=read_index(path, split, 64)).row() == fresh.row()


@pytest.mark.parametrize(
    "index, message",
    [
        (points(N, width=64), "the order of its images, but of 40 images taken evenly [0-9] are nearest to their own"),
        (points(N - 1, width=64), r"must be of shape \(40, 64\), .* but is \(39, 64\)"),
        (torch.zeros(N, 64), "row 0 has no direction"),
    ],
)
def test_another_index_is_refused(clip, split, index, message):
    with pytest.raises(UserError, match=message):
        retrieval(clip, split, quiet=True, index=index)


@pytest.mark.parametrize("ks", [(), (0, 1), (1, 2.0), (True,)])
def test_impossible_ks_are_refused(clip, split, ks):
    with pytest.raises(UserError, match="ks must be one or more whole numbers from 1, but are"):
        retrieval(clip, split, ks=ks, quiet=True)


def saved(array, save=np.save):
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


def filled(value, place=(3, 0)):
    array = np.ones((N, 4), np.float64)
    array[place] = value
    return array


@pytest.mark.parametrize(
    "content, message",
    [
        (saved(np.ones((N, 5), np.float32)), r"must be of shape \(40, 4\), .* but is \(40, 5\)"),
        (saved(np.ones(N, np.float32)), r"but is \(40,\)"),
        (saved(np.ones((N, 4), np.int8)), "must hold floats, but holds int8"),
        (saved(filled(np.nan)), "row 3 has no direction"),
        (saved(filled(1e300)), "row 3 has no direction"),
        (saved(filled(0, place=3)), "row 3 has no direction"),
        (saved(np.ones((N, 4)))[:-1], "cannot be read as .npy"),
        (saved(np.ones((N, 4)), np.savez), "cannot be read as .npy"),
        (saved(np.ones((N, 4))).replace(b"(40, 4)", b"(40, [)"), "cannot be read as .npy"),
        (saved(np.ones((N, 4))).replace(b"'descr'", b"b'desc'"), "cannot be read as .npy"),
        (b"", "cannot be read as .npy"),
        (None, "cannot be read as .npy .*No such file"),
    ],
)
def test_files_that_hold_no_index_are_refused(split, tmp_path, content, message):
    path = tmp_path / "index.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^index .*index.npy: .*{message}"):
        read_index(str(path), split, 4)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_loaded(split, tmp_path):
    path, sprung = tmp_path / "index.npy", tmp_path / "sprung"
    np.save(path, np.array([[Trap(sprung)]], object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as .npy .*allow_pickle=False"):
        read_index(str(path), split, 4)
    assert not sprung.exists()
    np.load(path, allow_pickle=True)
    assert sprung.exists()  # the trap works


def test_an_index_that_is_shifted_from_some_row_on_is_refused(clip):
    split = load_split("digits", "val", 150)
    index = embed_unpruned(clip, split)
    shifted = torch.cat([index[:100], index[101:], index[100:101]])
    with pytest.raises(UserError, match="of 64 images taken evenly 4[0-9] are nearest to their own rows"):
        retrieval(clip, split, quiet=True, index=shifted)
    assert retrieval(clip, split, quiet=True, index=index).row()["image_recall@1"] == 100


@torch.no_grad()
def test_unpruned_texts_and_images_are_of_the_pair_as_it_came(clip, split):
    plain = retrieval(clip, split, quiet=True).row()
    others = [clip.embed_words(" ".join(4 * [name])) for name in (*split.classes[1:], split.classes[0])]
    prompts = Prompts("T", 4, 64, classes=split.classes)
    prompts.text.copy_(torch.stack(others))  # every class is called by the next one's name
    clip.set_prompts(prompts)
    try:
        found, row = retrieval(clip, split, quiet=True), evaluate(clip, split, quiet=True).row()
    finally:
        clip.set_prompts(None)
    learned = found.row()
    assert learned["text_recall@1_unpruned"] == plain["text_recall@1_unpruned"] == row["accuracy_unpruned"]
    assert learned["text_recall@1"] == row["accuracy"] < learned["text_recall@1_unpruned"]
    assert learned["texts@1"] == pytest.approx(row["agreement"]) and learned["texts@1"] < 50
    torch.testing.assert_close(found.unpruned, F.normalize(embed_unpruned(clip, split), dim=-1), atol=1e-6, rtol=0)
    assert learned["drift_mean"] == 0  # text leaves images alone


@torch.no_grad()
def test_drift_of_a_prompted_tower_is_against_the_tower_as_it_came(clip, split):
    clip.visual.set_pruning(keep_rate=0.6)
    clip.set_prompts(Prompts("V", 4, 64, 64, seed=3))
    try:
        found, row = retrieval(clip, split, quiet=True), evaluate(clip, split, quiet=True).row()
    finally:
        clip.set_prompts(None)
    assert torch.equal(found.unpruned, F.normalize(embed_unpruned(clip, split), dim=-1))
    assert found.row()["drift_mean"] == pytest.approx(1 - row["cosine"], abs=1e-5) and found.row()["drift_mean"] > 1e-4
