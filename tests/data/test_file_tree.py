"""Every file below a folder is an image of the split `all`, or counted by why it is none."""

import json
import os
import random
import unicodedata
from collections import Counter

import pytest
from helpers.image_files import encoded, write

from patchrank.data.dataset_factory import load_split
from patchrank.data.readers.file_tree import HIDDEN, LEADS_BACK, NO_FILES
from patchrank.data.readers.folder import load_folder
from patchrank.utils.errors import UserError

IMAGE = encoded()


def load(root, split="all"):
    return load_folder("folder", split, str(root))


def fill(root, *names):
    for name in names:
        write(root / name, IMAGE)
    return root


STEMS = ["a", "b c", "ünï", "e\u0301te\u0301", "été", "x.v2", "UP", "up", "日本", "-", "0001", "a'\"$", "tab\there"]
ENDINGS = [
    ".png",
    ".JPG",
    ".jpeg",
    ".webp",
    ".heic",
    ".jxl",
    ".jpg_large",
    ".jpeg~",
    ".part",
    ".txt",
    ".json",
    "",
    ".mp4",
]
PLACES = ["cat", "dog", "dog/deep", "cafe\u0301", "3", "Dog", "sub.dir"]
SYSTEM = [
    "@eaDir",
    "#recycle",
    ".@__thumb",
    "$RECYCLE.BIN",
    "__MACOSX",
    "lost+found",
    "System Volume Information",
    "Temporary Items",
    ".git",
]
SHOWN = {".png", ".jpg", ".jpeg", ".webp"}


def random_tree(root, rng):
    """Makes a tree; returns the images' ids in NFC, other files by reason, and folders that are classes."""
    images, others, classes = [], Counter(), set()
    for _ in range(rng.randint(5, 25)):
        place, stem, ending = rng.choice(PLACES), rng.choice(STEMS), rng.choice(ENDINGS)
        kind = rng.choice(["plain"] * 6 + ["hidden", "system", "empty", "fifo", "back", "linked"])
        if kind == "system":
            place = f"{place}/{rng.choice(SYSTEM)}/{stem}"
        path = root / place / (f"._{stem}{ending}" if kind == "hidden" else f"{stem}{ending}")
        if os.path.lexists(path):
            continue
        classes.add(place.split("/")[0])
        if kind == "empty":
            (root / place / "nested empty").mkdir(parents=True, exist_ok=True)
            (root / "nothing in it").mkdir(exist_ok=True)
            classes.add("nothing in it")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "back":
            path.symlink_to(root)
        elif kind == "linked":
            path.symlink_to(root / "nowhere")
        else:
            write(path, IMAGE)
        reason = {"hidden": HIDDEN, "system": HIDDEN, "fifo": NO_FILES, "back": LEADS_BACK}.get(kind)
        if reason is None and ending.lower() in SHOWN:
            images.append(str(path.relative_to(root)))
        else:
            last = os.path.splitext(path.name)[1].lower()
            others[reason or (f"ending {last}" if last else "no ending")] += 1
    return images, others, classes


@pytest.mark.parametrize("seed", range(30))
def test_every_file_is_a_sample_or_counted(tmp_path, seed):
    images, others, classes = random_tree(tmp_path, random.Random(seed))
    if not images:
        with pytest.raises(UserError, match="holds no images"):
            load(tmp_path)
        return
    split = load(tmp_path)
    same = Counter(unicodedata.normalize("NFC", name) for name in images)
    names = [
        name if same[unicodedata.normalize("NFC", name)] > 1 else unicodedata.normalize("NFC", name) for name in images
    ]
    assert split.ids == sorted(names)
    assert sum(split.passed_over.values()) == others.total()
    counted = {why: many for why, many in split.passed_over.items() if why != "other endings"}
    assert counted == {why: others[why] for why in counted}
    assert set(split.classes) == {unicodedata.normalize("NFC", name) for name in classes}
    first = {unicodedata.normalize("NFC", name.split("/")[0]) for name in images}
    assert {split.classes[label] for label in split.labels} == first


def test_files_of_unknown_endings_are_counted_and_said_in_one_line(tmp_path, capsys):
    fill(tmp_path, "1.png", "2.heic", "3.HEIC", "4", "5.jpg_large", "@eaDir/1.png/thumb.jpg")
    split = load_split("folder", "all", None, str(tmp_path))
    assert split.passed_over == {
        "ending .heic": 2,
        "ending .jpg_large": 1,
        "no ending": 1,
        "hidden or in system folders": 1,
    }
    told = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert told == [
        f"folder {tmp_path}: passed over what is no image by its name or place, 5 in all: ending .heic (2), ending "
        ".jpg_large (1), no ending (1), hidden or in system folders (1)"
    ]


def test_a_line_is_said_once_for_all_splits_and_a_folder_without_images_tells_what_it_holds(tmp_path, capsys):
    fill(tmp_path / "some", "train/a/1.png", "val/a/2.png", "val/a/3.heic")
    (tmp_path / "some/train/b").mkdir()
    for split in ("train", "val", "all"):
        assert load_split("folder", split, None, str(tmp_path / "some")).passed_over == {"ending .heic": 1}
    told = capsys.readouterr().err
    assert told.count("passed over what is no image") == told.count("classes without images: 'b'") == 1
    fill(tmp_path / "none", "100APPLE/1.HEIC", "100APPLE/1.MOV", "00000.tar")
    with pytest.raises(
        UserError, match=r"none: holds no images; passed over: ending .heic \(1\), ending .mov \(1\), e"
    ):
        load(tmp_path / "none")


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("train", "test1"), ("Train", "Val2")])
def test_folders_called_as_splits_with_a_number_are_refused(tmp_path, names):
    fill(tmp_path, *(f"{name}/1.png" for name in names))
    with pytest.raises(UserError, match="look like splits, but folder .* does not fit"):
        load(tmp_path)


def test_numbered_folders_of_one_name_are_classes(tmp_path):
    assert load(fill(tmp_path, "test1/1.png", "test2/1.png", "cat/1.png")).classes == ("cat", "test1", "test2")


def test_many_odd_endings_are_counted_together(tmp_path):
    fill(tmp_path, "x.png", *(f"{n}.jpg?itok={n}" for n in range(5)), *(f"{n}.e{n}" for n in range(12)))
    found = load(tmp_path).passed_over
    assert sum(found.values()) == 17 and len(found) == 9 and found["other endings"] == 9


def test_what_splits_have_in_common_is_said_once_and_of_each_folder(tmp_path, capsys):
    for name in ("mine", "yours"):
        root = fill(tmp_path / name, "train/ant/a.png", "val/ant/b.png", "val/ant/c.heic")
        (root / "train" / "bee").mkdir()
        for part in ("train", "val", "train"):
            assert load_split("folder", part, None, str(root)).passed_over == {"ending .heic": 1}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and sum("passed over" in line for line in told) == 2


def test_a_folder_of_images_alone_passes_over_nothing(tmp_path, capsys):
    assert load_split("folder", "all", None, str(fill(tmp_path, "cat/1.png"))).passed_over == {}
    assert "passed over" not in capsys.readouterr().err


def test_an_empty_folder_stays_a_class_and_is_named(tmp_path, capsys):
    fill(tmp_path, "ant/1.png", "cat/1.png", "bee/notes.txt", "@eaDir/x/thumb.jpg", "cat/nested/2.png")
    (tmp_path / "cow").mkdir()
    (tmp_path / "cat" / "hollow").mkdir()
    split = load(tmp_path)
    assert split.classes == ("ant", "bee", "cat", "cow") and split.labels == [0, 2, 2]
    assert f"{tmp_path}: classes without images: 'bee', 'cow'; they stay classes" in capsys.readouterr().err


def test_a_class_that_one_split_lacks_keeps_its_label(tmp_path, capsys):
    fill(tmp_path, "train/ant/1.png", "train/cat/2.png", "val/cat/3.png", "extra.txt")
    for name in ("train/bee", "val/ant", "test/dog"):
        (tmp_path / name).mkdir(parents=True)
    assert load(tmp_path, "val").classes == load(tmp_path, "train").classes == ("ant", "bee", "cat", "dog")
    assert load(tmp_path, "val").labels == [2] and "'bee', 'dog'" in capsys.readouterr().err


def test_images_without_labels_get_no_classes_from_empty_folders(tmp_path, capsys):
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "later").mkdir()
    assert load(tmp_path).labels is None and load(tmp_path).classes == () and capsys.readouterr().err == ""


def test_a_store_counts_what_a_disk_does(tmp_path):
    import fsspec

    fill(tmp_path, "cat/1.png", "dog/notes.txt", "@eaDir/x.jpg", "._1.png", "cat/x.heic")
    fsspec.filesystem("memory").put(str(tmp_path), "/file_tree_test", recursive=True)
    there, here = load("memory://file_tree_test"), load(tmp_path)
    assert (there.ids, there.classes, there.passed_over) == (here.ids, here.classes, here.passed_over)
    assert here.classes == ("cat", "dog")


def test_names_that_differ_in_case_or_in_unicode_form_alone_are_images_of_their_own(tmp_path):
    fill(
        tmp_path,
        "cat/\u00e9.png",
        "cat/e\u0301.png",
        "Cat/1.png",
        "cat/n\u0303.png",
        "caf\u00e9/1.png",
        "cafe\u0301/2.png",
    )
    split = load(tmp_path)
    assert split.classes == ("Cat", "caf\u00e9", "cat")
    assert sorted(split.ids) == split.ids and len(split) == 6
    assert {"cat/\u00f1.png", "cat/\u00e9.png", "cat/e\u0301.png", "caf\u00e9/2.png"} <= set(split.ids)
    assert all(split.content(i) == IMAGE for i in range(6))


@pytest.fixture
def downloaded(tmp_path):
    """Two shards as img2dataset's `files` writes them."""
    for shard in ("00000", "00001"):
        for n in range(2):
            stem = f"{shard}/{shard}{n:04}"
            fill(tmp_path, f"{stem}.jpg")
            write(tmp_path / f"{stem}.txt", f"a picture {shard} {n}\n")
            write(tmp_path / f"{stem}.json", json.dumps({"caption": "other", "key": stem[6:]}))
        write(tmp_path / f"{shard}.parquet", b"PAR1")
        write(tmp_path / f"{shard}_stats.json", "{}")
    return tmp_path


def test_downloads_of_img2dataset_are_captions_and_no_classes(downloaded, capsys):
    split = load(downloaded)
    assert split.labels is None and split.classes == () and len(split) == 4
    assert split.captions == [(f"a picture {shard} {n}",) for shard in ("00000", "00001") for n in range(2)]
    assert split.passed_over == {"ending .json": 6, "ending .parquet": 2}
    assert "read as img2dataset wrote it: 4 images without labels, with captions" in capsys.readouterr().err


def test_downloads_of_img2dataset_in_splits_and_with_few_captions(downloaded, tmp_path, capsys):
    (downloaded / "train").mkdir()
    for name in os.listdir(downloaded):
        if name != "train":
            (downloaded / name).rename(downloaded / "train" / name)
    assert load(downloaded, "train").captions[3] == ("a picture 00001 1",)
    (downloaded / "train/00000/000000001.txt").unlink()
    split = load(downloaded)
    assert split.captions is None and split.passed_over["ending .txt"] == 3
    assert "1 have no caption beside them" in capsys.readouterr().err


def test_numbered_classes_are_not_taken_for_downloads(tmp_path):
    fill(tmp_path, "00000/000000000.jpg", "00001/000010000.jpg")  # no note of img2dataset's
    assert load(tmp_path).classes == ("00000", "00001")
    write(tmp_path / "00000.parquet", b"PAR1")
    assert load(tmp_path).classes == ()
    fill(tmp_path, "00002/0000201.jpg")  # 100 images a folder
    assert load(tmp_path).classes == ()
    fill(tmp_path, "00002/00000_00017.jpg")  # as in GTSRB
    assert load(tmp_path).classes == ("00000", "00001", "00002")


def test_a_caption_that_is_no_text_is_named(downloaded):
    caption = write(downloaded / "00001/000010000.txt", b"\xff\xfea")
    with pytest.raises(UserError, match=r"00001/000010000.txt: is not a text file in UTF-8$"):
        load(downloaded)
    caption.unlink()
    caption.symlink_to(downloaded / "nowhere")
    with pytest.raises(UserError, match=r"00001/000010000.txt: cannot be read \([^\n]*\)$"):
        load(downloaded)


@pytest.mark.parametrize("name", ["two\nlines.png", "two\nlines/x.png", "two\nlines/x.txt"])
def test_a_name_of_two_lines_is_refused_by_name(tmp_path, name):
    fill(tmp_path, "cat/1.png", f"cat/{name}" if "/" not in name else name)
    with pytest.raises(UserError, match=r"the name '[^\n]*two\\nlines[^\n]*' is not one line of text"):
        load(tmp_path)


@pytest.mark.parametrize(
    "given, rule",
    [
        ({"limit": -1}, "limit must be a whole number"),
        ({"limit": "4"}, "limit must be a whole number"),
        ({"limit": 2.5}, "limit must be a whole number"),
        ({"task": ["digits"]}, "data .'digits'. does not exist"),
        ({"task": "wds", "root": ["a.tar"]}, "data.root must be a path or URL"),
    ],
)
def test_wrong_kinds_of_settings_are_named(given, rule):
    with pytest.raises(UserError, match=rule):
        load_split(**{"task": "digits", "split": "val"} | given)
