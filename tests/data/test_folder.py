import os
import pickle

import numpy as np
import pytest
from helpers.image_files import encoded, pixels, write
from PIL import Image

from patchrank.data.readers.folder import load_folder
from patchrank.utils.errors import UserError


def load(root, split="all"):
    return load_folder("folder", split, None if root is None else str(root))


@pytest.fixture
def pets(tmp_path):
    """Two classes, six images, and files that are no images."""
    for n, name in enumerate(
        ["dog/b.jpg", "dog/a.JPG", "dog/deep/er/c.png", "cat/2.webp", "cat/1.gif", "cat/a b é.bmp"]
    ):
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(name.rpartition(".")[2].lower(), name.rpartition(".")[2].upper())
        write(tmp_path / "pets" / name, encoded(pixels(seed=n), kind))
    for name in ("notes.txt", "dog/.hidden.jpg", ".cache/x.jpg", "cat/labels.json", "cat/scan.pdf", "empty/readme.md"):
        write(tmp_path / "pets" / name, "no image")
    return tmp_path / "pets"


def test_folders_are_classes(pets):
    split = load(pets)
    assert split.ids == ["cat/1.gif", "cat/2.webp", "cat/a b é.bmp", "dog/a.JPG", "dog/b.jpg", "dog/deep/er/c.png"]
    assert split.classes == ("cat", "dog", "empty") and split.labels == [0, 0, 0, 1, 1, 1]
    assert split.passed_over == {
        "ending .json": 1,
        "ending .md": 1,
        "ending .pdf": 1,
        "ending .txt": 1,
        "hidden or in system folders": 2,
    }
    assert (split.task, split.split, split.decoding, split.captions) == ("folder", "all", "viewer", None)
    assert split.templates == ("a photo of a {}.",)
    assert split.read(5) == (pets / "dog/deep/er/c.png").read_bytes()
    assert np.array_equal(np.asarray(split.image(5)), pixels(seed=2))


def test_images_without_folders_are_unlabelled(tmp_path):
    for name in "cab":
        write(tmp_path / f"{name}.png", encoded())
    split = load(tmp_path)
    assert (split.ids, split.labels, split.classes) == (["a.png", "b.png", "c.png"], None, ())


def test_classes_called_by_numbers_are_in_the_order_of_numbers(tmp_path):
    for name in ("10", "9", "0"):
        write(tmp_path / name / "x.png", encoded())
    assert load(tmp_path).classes == ("0", "9", "10")
    write(tmp_path / "ten" / "x.png", encoded())
    assert load(tmp_path).classes == ("0", "10", "9", "ten")


def test_folders_called_by_splits_are_splits(tmp_path):
    for name in ("train/dog/1.png", "train/emu/2.png", "val/dog/3.png", "val/ant/4.png"):
        write(tmp_path / name, encoded())
    val = load(tmp_path, "val")
    assert (val.ids, val.classes, val.labels) == (
        ["val/ant/4.png", "val/dog/3.png"],
        ("ant", "dog", "emu"),  # of both splits
        [0, 1],
    )
    assert load(tmp_path, "train").labels == [1, 2] and len(load(tmp_path)) == 4
    with pytest.raises(UserError, match=r"split 'test' does not exist; .*known: all, train, val"):
        load(tmp_path, "test")


@pytest.mark.parametrize(
    "folders, others",
    [
        ("train valid test", "folder valid"),
        ("train validation", "folder validation"),
        ("train Val test", "folder Val"),
        ("Train TEST", "folder TEST"),
        ("train val test extra", "folder extra"),
        ("training testing", "folder testing"),
        ("train val .", "image 0.png"),
    ],
)
def test_folders_that_are_half_splits_are_refused(tmp_path, folders, others):
    for folder in folders.split():
        name = "0.png" if folder == "." else "dog/1.png"
        write(tmp_path / folder / name, encoded())
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    said, alike = str(caught.value), sorted(name for name in folders.split() if name not in (".", "extra"))
    assert f"data.root {tmp_path}: folders {', '.join(alike)} look like splits, but {others} does not fit" in said
    assert "exactly train, val, test" in said and "CSV file with a column 'split'" in said and "\n" not in said


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("test", "bus", "tram"):
        write(tmp_path / "a" / name / "1.png", encoded())
    assert load(tmp_path / "a").classes == ("bus", "test", "tram")
    write(tmp_path / "a" / "train" / "notes.txt", "a folder without images is a class, but no split")
    assert load(tmp_path / "a").classes == ("bus", "test", "train", "tram")
    write(tmp_path / "b" / "test" / "dog" / "1.png", encoded())
    assert load(tmp_path / "b", "test").classes == ("dog",)


def test_a_test_split_may_lack_labels_that_train_has(tmp_path):
    for name in ("train/dog/1.png", "train/emu/2.png", "test/3.png"):
        write(tmp_path / name, encoded())
    test = load(tmp_path, "test")
    assert test.labels is None and test.classes == ("dog", "emu")
    with pytest.raises(
        UserError, match=r"^test/3.png: has no label, but train/dog/1.png has; all must have one, or none$"
    ):
        load(tmp_path)


def test_other_piles_are_split_by_each_name_alone(tmp_path):
    for n in range(200):
        write(tmp_path / f"{'ab'[n % 2]}/{n:03}.png", b"never read")
    parts = {name: load(tmp_path, name) for name in ("train", "val", "test")}
    sizes = [len(part) for part in parts.values()]
    assert sum(sizes) == 200 and np.abs(np.array(sizes) - [100, 40, 60]).max() < 20
    assert sorted(name for part in parts.values() for name in part.ids) == load(tmp_path).ids
    for n in range(0, 200, 2):
        os.remove(tmp_path / f"a/{n:03}.png")
    for name, part in parts.items():
        assert load(tmp_path, name).ids == [i for i in part.ids if i.startswith("b/")]
    assert parts["val"].ids[:3] == ["a/000.png", "a/006.png", "a/008.png"]  # frozen: figures rest on it


def test_links_are_followed_but_never_in_circles(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write(elsewhere / "1.png", encoded())
    write(root / "cat" / "2.png", encoded())
    (root / "dog").symlink_to(elsewhere)
    (root / "cat" / "up").symlink_to(root)
    (elsewhere / "cats").symlink_to(root / "cat")
    (root / "cat" / "self.png").symlink_to(root / "cat" / "self.png")
    names = load(root).ids
    assert {"cat/2.png", "dog/1.png", "dog/cats/2.png"} <= set(names) and len(names) < 12
    assert "cat/self.png" in names  # a dead link: a broken image, and told of as such


def test_a_folder_behind_a_url(pets):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(pets), "/pets_of_the_folder_test", recursive=True)
    there, here = load("memory://pets_of_the_folder_test"), load(pets)
    assert there.ids == here.ids and there.labels == here.labels and there.read(2) == here.read(2)


@pytest.mark.parametrize(
    "root, message",
    [
        (None, "data.root is missing: task 'folder' needs a folder of images, or a CSV file"),
        ("nowhere", "there is no such folder or CSV file"),
        ("nowhere.csv", "there is no such folder or CSV file"),
        ("notes.txt", "is a file, but must be a folder of images, or a CSV file"),
        ("empty", "holds no images"),
        ("bad://x", "fsspec cannot open this kind of URL"),
    ],
)
def test_roots_that_hold_nothing(pets, root, message):
    with pytest.raises(UserError, match=message) as caught:
        load(root if root is None or "://" in root else pets / root)
    assert "\n" not in str(caught.value)


def test_empty_and_unknown_splits(pets):
    with pytest.raises(UserError, match="did you mean 'train'"):
        load(pets, "trian")
    for name in ("cat", "dog"):
        for file in (pets / name).iterdir():
            if file.name != "1.gif":
                file.rename(file.with_suffix(".txt")) if file.is_file() else file.rename(pets / ".gone")
    splits = {"train", "val", "test"}
    filled = {name for name in splits if load_or_none(pets, name)}
    assert len(filled) == 1
    with pytest.raises(UserError, match="is empty, since a hash of each name .* take split 'all'"):
        load(pets, (splits - filled).pop())


def load_or_none(root, split):
    try:
        return load(root, split)
    except UserError:
        return None


def test_names_that_are_no_text_are_refused(tmp_path):
    write(tmp_path / "fine\u202fname.png", encoded())
    assert load(tmp_path).ids == ["fine\u202fname.png"]
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    with pytest.raises(UserError, match=r"name '\\udcff.png' is not one line of text in UTF-8; rename the file"):
        load(tmp_path)


def test_a_folder_can_be_sent_to_another_process(pets):
    split = pickle.loads(pickle.dumps(load(pets).first(3)))
    assert split.read(2) == (pets / "cat/a b é.bmp").read_bytes() and len(split) == 3


def test_a_rotated_photo_and_a_plain_one_come_through_the_split(tmp_path):
    tags = Image.Exif()
    tags[0x112] = 6
    write(tmp_path / "turned.jpg", encoded(kind="JPEG", exif=tags))
    write(tmp_path / "upright.jpg", encoded(kind="JPEG"))
    split = load(tmp_path)
    assert [split.image(i).size for i in range(2)] == [(8, 12), (12, 8)]
