"""Few-shot draws against the images that CoOp's own code is known to have drawn."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.coop_copies import COPIES, make_named, write, write_split

from patchrank.data.coop import NAMED, load_named
from patchrank.data.few_shot import few_shot, load_few_shot
from patchrank.utils.errors import UserError

DTD = [[label for label in range(47) for _ in range(count)] for count in (60, 24)]
FOOD = [[label for label in range(101) for _ in range(count)] for count in (500, 200)]


def drawn(labels: list[list[int]], seed: int, part: int, label: int, each: int, shots: int = 16) -> list[int]:
    """Places within one class of what is drawn from it; classes have `each` images."""
    places = few_shot(*labels, shots, seed)[part]
    return [place - label * each for place in places if place // each == label]


@pytest.mark.parametrize(
    "seed, train, val",
    [
        (1, [8, 36, 54, 51, 48, 4, 16, 7, 31, 55, 28, 30, 41, 24, 13, 6], [18, 0, 20, 19]),
        (2, [55, 54, 3, 5, 56, 23, 53, 10, 47, 42, 19, 16, 38, 13, 51, 2], [15, 3, 4, 6]),
        (3, [15, 37, 34, 8, 23, 38, 30, 40, 58, 4, 54, 0, 53, 16, 35, 14], [3, 17, 4, 10]),
    ],
)
def test_first_class_of_dtd(seed, train, val):
    assert drawn(DTD, seed, 0, 0, 60) == train
    assert drawn(DTD, seed, 1, 0, 24) == val


def test_later_classes_of_dtd():
    assert drawn(DTD, 1, 0, 1, 60)[:6] == [31, 1, 57, 53, 24, 27]
    assert drawn(DTD, 1, 0, 46, 60)[:6] == [27, 38, 34, 26, 7, 42]
    assert drawn(DTD, 1, 1, 46, 24) == [15, 8, 19, 10]
    assert [len(places) for places in few_shot(*DTD, 16, 1)] == [16 * 47, 4 * 47]


def test_first_class_of_food101():
    known = [68, 291, 433, 410, 391, 32, 130, 60, 253, 389, 230, 241, 333, 194, 403, 107]
    assert drawn(FOOD, 1, 0, 0, 500) == known


def test_a_small_class_gives_all_it_has_and_draws_nothing():
    train, val = few_shot([0] * 5 + [1] * 2 + [2] * 7, [], 3, 1)
    assert (train, val) == ([1, 0, 4, 5, 6, 7, 10, 12], [])


def test_a_class_of_just_as_many_images_is_drawn_too():
    rng = random.Random(1)
    known = rng.sample(range(4), 4) + [4 + place for place in rng.sample(range(7), 4)]
    assert few_shot([0] * 4 + [1] * 7, [], 4, 1)[0] == known and known[:4] != [0, 1, 2, 3]


@pytest.mark.parametrize("shots, val_shots", [(1, 1), (2, 2), (4, 4), (8, 4)])
def test_val_has_at_most_four_a_class(shots, val_shots):
    train, val = few_shot(*DTD, shots, 1)
    assert (len(train), len(val)) == (47 * shots, 47 * val_shots)


def test_groups_come_in_the_order_in_which_the_list_meets_them():
    sorted_train, _ = few_shot([0] * 9 + [1] * 9, [], 2, 1)
    met_late, _ = few_shot([1] * 9 + [0] * 9, [], 2, 1)
    assert met_late == sorted_train  # the first group met draws first, whatever its label
    mixed, _ = few_shot([5, 3] * 9, [], 2, 1)
    assert mixed == [2 * place for place in sorted_train[:2]] + [2 * (place - 9) + 1 for place in sorted_train[2:]]


def test_val_goes_on_with_the_stream_of_train():
    _, val = few_shot(*DTD, 16, 1)
    _, alone = few_shot([], DTD[1], 16, 1)
    assert val != alone and len(val) == len(alone)


@pytest.mark.parametrize("shots", [0, -1])
def test_shots_start_at_one(shots):
    with pytest.raises(UserError, match=f"shots must be a whole number from 1, but is {shots}"):
        few_shot([0], [0], shots, 1)


@pytest.mark.parametrize(
    "shots, seed", [("16", 1), (1.0, 1), (True, 1), (None, 1), (1, None), (1, "1"), (1, 0.5), (1, -1)]
)
def test_shots_and_seed_are_whole_numbers(shots, seed):
    name, least, value = ("shots", 1, shots) if seed == 1 else ("seed", 0, seed)
    for draw in (lambda: few_shot([0], [0], shots, seed), lambda: load_few_shot("dtd", shots, seed, None)):
        with pytest.raises(UserError) as caught:
            draw()
        assert str(caught.value) == f"{name} must be a whole number from {least}, but is {value!r}"


def test_numpys_whole_numbers_are_whole_numbers_too():
    assert few_shot(*DTD, np.int64(2), np.int64(1)) == few_shot(*DTD, 2, 1)


def test_a_named_dataset_is_drawn_in_the_order_of_its_split_file(tmp_path):
    make_named(tmp_path, "flowers102")
    all_train, all_val = (load_named("flowers102", split, str(tmp_path)) for split in ("train", "val"))
    train, val = load_few_shot("flowers102", 2, 1, str(tmp_path))
    places, val_places = few_shot(all_train.labels, all_val.labels, 2, 1)
    assert train.labels == [2, 2, 0, 0, 1, 1] and val.labels == [2, 0, 1]
    assert train.ids == [all_train.ids[place] for place in places] and val.ids == [all_val.ids[i] for i in val_places]
    assert train.read(3) == all_train.read(places[3]) and train.classes == all_train.classes


def test_the_published_first_images_of_dtd(tmp_path):
    """With those four at the places of the split file where seed 1 finds them, they are the first of the draw."""
    folder = make_named(tmp_path, "dtd")
    first = {8: "0117", 36: "0142", 54: "0147", 51: "0102"}
    names = [f"banded/banded_{first.get(place, f'1{place:03d}')}.jpg" for place in range(60)]
    split = COPIES["dtd"].split()
    split["train"] = [[name, 0, "banded"] for name in names] + split["train"][3:]
    write_split(tmp_path, "dtd", split)
    write(folder / "images" / names[0], b"")
    train, _ = load_few_shot("dtd", 16, 1, str(tmp_path))
    assert train.ids[:4] == [f"banded/banded_{number}.jpg" for number in ("0117", "0142", "0147", "0102")]


def test_imagenet_has_no_val_of_its_own(tmp_path):
    make_named(tmp_path, "imagenet")
    train, val = load_few_shot("imagenet", 2, 1, str(tmp_path))
    assert val is None and train.labels == [0, 0, 1, 1, 2, 2, 3, 3]
    assert train.ids[:2] == ["n01440764/n01440764_18.JPEG", "n01440764/n01440764_4.JPEG"]


def test_a_task_that_is_not_named():
    with pytest.raises(UserError, match="few-shot draws are made from named datasets, and 'dtdd' is none; did you"):
        load_few_shot("dtdd", 1, 1, "/")


class Trap:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickles_of_dassl_are_never_opened(tmp_path):
    mark = tmp_path / "ran"
    trap = pickle.dumps(Trap(mark))
    for task in NAMED:
        folder = make_named(tmp_path, task)
        for name in ("split_fewshot/shot_1-seed_1.pkl", "preprocessed.pkl"):
            write(folder / name, trap)
        load_few_shot(task, 1, 1, str(tmp_path))
        load_named(task, "test", str(tmp_path))
    assert not mark.exists()
    pickle.loads(trap)
    assert mark.exists()  # so the trap is one
