import numpy as np
import pytest

from patchrank.data import digits
from patchrank.data.captions import draw_template
from patchrank.data.tasks import load_split
from patchrank.errors import UserError


def test_splits_share_neither_digits_nor_background():
    parts = {split: set(digits.split_digits(split)) for split in digits.SPLITS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 1797
    shares = [len(parts[split]) / 1797 for split in ("pretrain", "adapt", "val", "test")]
    assert np.allclose(shares, [0.5, 0.2, 0.1, 0.2], atol=0.005)
    for photo in range(2):
        widths = [digits._strips(split)[photo].shape[1] for split in digits.SPLITS]
        assert sum(widths) == 640
        whole = np.concatenate([digits._strips(split)[photo] for split in digits.SPLITS], axis=1)
        assert np.array_equal(whole, digits._photographs()[photo])


def test_every_class_is_split_in_the_same_way():
    for split in digits.SPLITS:
        labels = digits._digits()[1][digits.split_digits(split)]
        counts = np.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 6


def test_scenes_are_functions_of_the_seed():
    one, two = digits.DigitScenes("test"), digits.DigitScenes("test")
    assert all(np.array_equal(one[i], two[i]) for i in (0, 5, 700))
    other = digits.DigitScenes("test", seed=1)
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], one[len(one.digits)])  # the same digit in its next scene
    assert one.labels[0] == one.labels[len(one.digits)]


def test_digit_size_lies_between_30_and_60_percent(monkeypatch):
    sides = []
    glyph = digits._glyph
    monkeypatch.setattr(digits, "_glyph", lambda digit, side, tilt: sides.append(side) or glyph(digit, side, tilt))
    scenes = digits.DigitScenes("val")
    for i in range(200):
        assert scenes[i].size == (64, 64)
    assert 0.3 * 64 - 0.5 <= min(sides) <= 20 and 37 <= max(sides) <= 0.6 * 64 + 0.5


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
