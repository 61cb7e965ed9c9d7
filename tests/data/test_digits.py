import hashlib
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.image_files import encoded

from patchrank.data.dataset_factory import load_split
from patchrank.data.digits import scenes
from patchrank.data.digits.captions import draw_template
from patchrank.data.image_split import ImageSplit, Reader
from patchrank.utils.errors import UserError

HASHES = {"digits": "bff8d4d5f9b7", "digits_full": "d75ac50f1aeb", "digits_ink": "73a17203a1e9"}


def test_splits_share_neither_digits_nor_background():
    from sklearn.datasets import load_sample_images

    parts = {split: set(scenes.split_digits(split)) for split in scenes.SPLITS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 1797
    shares = [len(parts[split]) / 1797 for split in ("pretrain", "adapt", "val", "test")]
    assert np.allclose(shares, [0.5, 0.2, 0.1, 0.2], atol=0.005)
    for photo, image in enumerate(load_sample_images().images):
        widths = [scenes._strips(split)[photo].shape[1] for split in scenes.SPLITS]
        assert sum(widths) == 640
        whole = np.concatenate([scenes._strips(split)[photo] for split in scenes.SPLITS], axis=1)
        assert np.array_equal(whole, image)


def test_the_digits_that_ship_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images, labels = scenes._digits()
    theirs = load_digits()
    assert np.array_equal(images, (theirs.images / 16 * 255).round()) and np.array_equal(labels, theirs.target)


def test_every_class_is_split_in_the_same_way():
    for split in scenes.SPLITS:
        labels = scenes._digits()[1][scenes.split_digits(split)]
        counts = np.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 6


def test_scenes_are_functions_of_the_seed():
    one, two = scenes.DigitScenes("test"), scenes.DigitScenes("test")
    assert all(np.array_equal(one[i], two[i]) for i in (0, 5, 700))
    other = scenes.DigitScenes("test", seed=1)
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], one[len(one.digits)])  # the same digit in its next scene
    assert one.labels[0] == one.labels[len(one.digits)]


def test_digit_size_lies_between_30_and_60_percent(monkeypatch):
    sides = []
    glyph = scenes._glyph
    monkeypatch.setattr(scenes, "_glyph", lambda digit, side, *rest: sides.append(side) or glyph(digit, side, *rest))
    drawn = scenes.DigitScenes("val")
    for i in range(200):
        assert drawn[i].size == (64, 64)
    assert 0.3 * 64 - 0.5 <= min(sides) <= 20 and 37 <= max(sides) <= 0.6 * 64 + 0.5


def test_in_digits_full_the_digit_fills_90_to_100_percent(monkeypatch):
    sides, glyph = [], scenes._glyph
    monkeypatch.setattr(scenes, "_glyph", lambda digit, side, *rest: sides.append(side) or glyph(digit, side, *rest))
    drawn = scenes.DigitScenes("val", task="digits_full")
    for i in range(200):
        assert drawn[i].size == (64, 64)
    assert min(sides) >= 0.9 * 64 - 0.5 and max(sides) == 64


def test_in_digits_ink_writing_is_darker_than_the_paper_around_it():
    drawn, plain = scenes.DigitScenes("val", task="digits_ink"), scenes.STYLES["digits_ink"]
    for i in range(20):
        rng = np.random.default_rng([0, scenes.VERSION, int(drawn.digits[i]), 0])
        blank = scenes.draw_scene(np.zeros((8, 8), np.uint8), [], rng, plain)
        change = np.asarray(drawn[i]).astype(int).sum(-1) - np.asarray(blank).astype(int).sum(-1)
        written = change != 0
        assert 0.01 < written.mean() < 0.4 and (change[written] < 0).mean() > 0.8


@pytest.mark.parametrize("task, sha256", HASHES.items())
def test_frozen_pictures_have_not_changed(task, sha256):
    """Weights and records rest on them; a new drawing needs a new `VERSION`, and other weights."""
    split = load_split(task, "val", 50)
    pixels = b"".join(np.asarray(split.image(i)).tobytes() for i in range(50))
    assert hashlib.sha256(pixels).hexdigest()[:12] == sha256


@pytest.mark.parametrize("task", scenes.STYLES)
def test_every_task_is_a_function_of_its_name_and_shares_digits_with_the_others(task):
    one, two = load_split(task, "test"), load_split(task, "test")
    assert one.ids[0].startswith(f"{task}/test/") and one.read(7) == two.read(7)
    assert [name.split("/")[-1] for name in one.ids] == [
        name.split("/")[-1] for name in load_split("digits", "test").ids
    ]
    assert len(one) >= 4 * 359


@pytest.mark.parametrize(
    "task, low, high",
    [
        ("digits", 93, 100),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("digits_full", 93, 100), ("digits_ink", 70, 90))),
    ],
)
def test_the_frozen_weights_know_the_tasks(clip, task, low, high):
    from patchrank.models.embed import evaluate

    assert low <= evaluate(clip, load_split(task, "val", 360), quiet=True).row()["accuracy_unpruned"] <= high


def test_frozen_weights_have_not_changed(clip):
    assert clip.sha256()[:12] == "8fa6bc70cb7a"


def test_a_loaded_split_gives_the_same_batches(clip):
    split = load_split("digits_ink", "val", 20)
    loaded = split.loaded(clip.transform(), limit=1 << 29)
    assert loaded.tensors is not None and split.loaded(clip.transform(), limit=1000).tensors is None
    for (a, places), (b, same) in zip(split.batches(clip.transform(), 8), loaded.batches(clip.transform(), 8)):
        assert places == same and (a == b).all()
    assert loaded.first(5).tensors.shape[0] == len(loaded.first(5)) == 5 and len(loaded.first(None)) == 20


@pytest.fixture
def numbered():
    """40 images of a folder, each grey in its own number; image 0 takes longest to come."""

    def fetch(n):
        time.sleep(0.05 * (n == 0))
        return encoded(np.full((2, 3, 3), n, np.uint8))

    ids = [f"{n:02}" for n in range(40)]
    return ImageSplit("folder", "all", ids, None, (), (), Reader(fetch, range(40)), decoding="viewer")


def grey(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_batches_come_in_order_from_threads_that_end(numbered):
    before, threads = threading.active_count(), set()

    def transform(image):
        threads.add(threading.current_thread())
        return grey(image)

    batches = list(numbered.batches(transform, 7))
    assert [(part.start, part.stop) for _, part in batches] == [(n, min(n + 7, 40)) for n in range(0, 40, 7)]
    assert torch.equal(torch.cat([images for images, _ in batches])[:, 0, 0, 0], torch.arange(40, dtype=torch.uint8))
    assert threading.main_thread() not in threads and threading.active_count() == before
    assert list(numbered.first(0).batches(transform, 7)) == []


def test_the_next_batch_is_under_way_and_no_more_and_stops_with_its_caller(numbered):
    begun = []
    batches = numbered.batches(lambda image: begun.append(image.getpixel((0, 0))[0]) or grey(image), 4)
    before = threading.active_count()
    next(batches)
    until = time.monotonic() + 5
    while len(begun) < 8 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(begun) == list(range(8))
    batches.close()
    assert len(begun) == 8 and threading.active_count() == before


def test_what_goes_wrong_in_a_batch_is_raised_where_its_turn_is(numbered):
    def fetch(n):
        return b"" if n in (9, 10) else encoded()

    batches = replace(numbered, read=Reader(fetch, range(40))).batches(grey, 4)
    before = threading.active_count()
    assert [part.start for _, part in (next(batches), next(batches))] == [0, 4]
    with pytest.raises(UserError, match=r"^folder/all: image 09 cannot be decoded \(the file is empty\)$"):
        next(batches)
    assert threading.active_count() == before


def test_embedded_scenes_are_drawn_where_they_are_asked_for():
    """Threads would only fight over the interpreter for them."""
    seen = []
    split = load_split("digits", "val", 4)
    list(split.batches(lambda image: seen.append(threading.current_thread()) or grey(image), 2))
    assert seen == [threading.main_thread()] * 4


def test_a_task_has_at_least_four_scenes_of_each_test_digit():
    split = load_split("digits", "test")
    assert len(split) == len(split.ids) == len(set(split.ids)) >= 4 * 359
    assert split.image(3).size == (64, 64)
    assert load_split("digits", "test", 10).ids == split.ids[:10]


def test_captions_vary_in_length_and_go_beyond_24_tokens(clip):
    rng = np.random.default_rng(0)
    texts = [draw_template(rng).format("seven") for _ in range(300)]
    lengths = clip.tokenize(texts).argmax(1) + 1
    assert len(set(texts)) > 150 and lengths.min() < 8 and 32 < lengths.max() < 77


@pytest.mark.parametrize("task, split, near", [("digit", "test", "digits"), ("digits", "tset", "test")])
def test_unknown_names_are_answered_with_near_ones(task, split, near):
    with pytest.raises(UserError, match=f"did you mean {near!r}"):
        load_split(task, split)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"limit": -3}, "^limit must be a whole number of images from 1, or None for all, but is -3$"),
        ({"limit": 0}, "^limit must be .* but is 0$"),
        ({"limit": 2.5}, "^limit must be .* but is 2.5$"),
        ({"templates": "a {}"}, r"^templates must be a list, but is the text 'a {}'; try \['a {}'\]$"),
    ],
)
def test_what_no_split_can_be_made_of_is_named(how, message):
    with pytest.raises(UserError, match=message):
        load_split("digits", "val", **how)
    assert len(load_split("digits", "val", np.int64(3), templates=["a {}"])) == 3
