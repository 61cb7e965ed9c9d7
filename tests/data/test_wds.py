import gzip
import tarfile

import fsspec
import numpy as np
import pytest
from helpers.image_files import encoded, pixels, trap, write
from helpers.tars import tar_of

from patchrank.data.broken_images import without_broken
from patchrank.data.class_names import read_vocabulary
from patchrank.data.dataset_factory import load_split
from patchrank.data.readers.file_tree import HIDDEN
from patchrank.data.readers.wds import load_wds
from patchrank.utils.errors import UserError


def load(root, split="all"):
    return load_wds("wds", split, None if root is None else str(root))


def shard(first=0, count=4, label=lambda n: n % 2):
    """Samples with an image and a label each."""
    return tar_of(
        member
        for n in range(first, first + count)
        for member in ((f"{n:05}.cls", str(label(n))), (f"{n:05}.png", encoded(pixels(seed=n))))
    )


def test_images_labels_and_captions_of_a_tar(tmp_path):
    members = [
        ("b.jpg", encoded(kind="JPEG")),
        ("b.cls", "emu\n"),
        ("b.txt", "an emu, running"),
        ("a.cls", "dog"),
        ("a.json", '{"caption": "ein Hund äußert sich", "width": 12}'),
        ("a.PNG", encoded(pixels(seed=1))),
        ("readme.txt", "for nobody"),
        ("__meta__", b"{"),
        ("._a.png", b"what another system leaves"),
        ("Makefile", b"all:"),
    ]
    split = load(write(tmp_path / "pets.tar", tar_of(members)))
    assert split.ids == ["pets/a", "pets/b"] and split.classes == ("dog", "emu") and split.labels == [0, 1]
    assert split.captions == [("ein Hund äußert sich",), ("an emu, running",)]
    assert (split.task, split.split, split.decoding) == ("wds", "all", "viewer")
    assert split.passed_over == {"ending .txt": 1, HIDDEN: 1, "notes of WebDataset": 1, "no ending": 1}
    assert split.read(1) == members[0][1] and np.array_equal(np.asarray(split.image(0)), pixels(seed=1))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_images_are_read_by_their_place_whatever_the_headers(tmp_path, form):
    names = ["x.png", "train/cat/" + "n" * 80 + ".png", "ü" * 20 + ".png"]
    names += [] if form == tarfile.USTAR_FORMAT else ["l" * 150 + "/" + "m" * 150 + ".png"]
    contents = {name: encoded(pixels(seed=n)) for n, name in enumerate(names)}
    split = load(write(tmp_path / "t.tar", tar_of(contents.items(), form)))
    assert {name: split.read(i) for i, name in enumerate(split.ids)} == {
        f"t/{name[: -len('.png')]}": content for name, content in contents.items()
    }
    assert split.labels is None and split.classes == () and split.captions is None


def test_numbered_labels_wait_for_a_vocabulary(tmp_path):
    split = load(write(tmp_path / "n.tar", shard()))
    assert split.labels == [0, 1, 0, 1] and split.classes == ()
    for text in ("classes: [cat, dog]", "classes: {0: cat, 1: dog}"):
        named = read_vocabulary(str(write(tmp_path / "names.yaml", text))).apply(split)
        assert named.classes == ("cat", "dog") and named.labels == [0, 1, 0, 1]
    for text, message in [
        ("classes: [cat]", r"classes: holds 1 names, but the label of n/00001 is 1"),
        ("classes: {0: cat}", r"classes: holds 1 names, but the label of n/00001 is 1"),
        ("classes: {1: dog, 2: cat}", "classes.0: is missing"),
    ]:
        with pytest.raises(UserError, match=f"names.yaml: {message}"):
            read_vocabulary(str(write(tmp_path / "names.yaml", text))).apply(split)


def test_a_whole_number_of_any_length_is_a_number(tmp_path):
    texts = ["0", "007", "0" * 5000 + "12", "2147483647", "1234567890"]
    members = [
        (f"{n}.{end}", part) for n, text in enumerate(texts) for end, part in (("png", encoded()), ("cls", text))
    ]
    split = load(write(tmp_path / "n.tar", tar_of(members)))
    assert split.labels == [0, 7, 12, 2147483647, 1234567890] and split.classes == ()


@pytest.fixture
def shards(tmp_path):
    for n in range(3):
        write(tmp_path / "set" / f"data-{n:03}.tar", shard(4 * n))
    return tmp_path / "set"


def test_brace_patterns_lists_globs_and_folders_are_the_same(shards):
    whole = load(shards)
    assert len(whole) == 12 and whole.ids[:5] == [f"data-000/{n:05}" for n in range(4)] + ["data-001/00004"]
    joined = "::".join(str(shards / f"data-{n:03}.tar") for n in (2, 0, 1))
    for root in (shards / "data-{000..002}.tar", shards / "data-*.tar", shards / "data-00[0-2].tar", joined):
        assert load(root).ids == whole.ids
    two = load(shards / "data-{000,002}.tar")
    assert len(two) == 8 and two.read(7) == whole.read(11)
    assert np.array_equal(np.asarray(two.image(4)), pixels(seed=8))


def test_tars_behind_urls(shards):
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/set_of_the_wds_test", recursive=True)
    whole = load(shards)
    for root in ("data-{000..002}.tar", "data-*.tar", ""):
        there = load(f"memory://set_of_the_wds_test/{root}")
        assert there.ids == whole.ids and there.read(9) == whole.read(9) and there.labels == whole.labels
    assert load(f"file://{shards}/data-001.tar").read(0) == whole.read(4)
    mixed = load(f"memory://set_of_the_wds_test/data-000.tar::{shards}/data-001.tar")
    assert len(mixed) == 8 and {mixed.read(i) for i in range(8)} == {whole.read(i) for i in range(8)}


def test_an_image_is_read_without_the_rest_of_its_tar(shards, monkeypatch):
    whole, asked = load(shards), []
    filesystem = fsspec.filesystem("file")
    fetch = type(filesystem).cat_file
    monkeypatch.setattr(
        type(filesystem), "cat_file", lambda self, *a, **k: asked.append(k["end"] - k["start"]) or fetch(self, *a, **k)
    )
    again = load(shards)
    assert asked == [] and again.read(5) == whole.read(5) and len(again.read(0)) == asked[-1] < 1000


def test_a_tar_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path, opened = write(tmp_path / "a.tar", shard()), []
    real = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda **how: opened.append(how) or real(**how))
    assert [len(load(path)) for _ in range(3)] == [4, 4, 4] and len(opened) == 1
    content = shard(count=5)
    opened.clear()
    write(path, content)
    assert len(load(path)) == 5 and len(opened) == 1


def test_folders_called_by_splits_are_splits(tmp_path):
    for split, names in (("train", "ab"), ("test", "bc")):
        write(tmp_path / split / "000.tar", shard(label=lambda n, names=names: names[n % 2]))
    test = load(tmp_path, "test")
    assert test.ids[0] == "test/000/00000" and test.classes == ("a", "b", "c") and test.labels == [1, 2, 1, 2]
    assert len(load(tmp_path, "train")) == 4 and len(load(tmp_path)) == 8
    with pytest.raises(UserError, match="split 'val' does not exist; .*known: all, test, train"):
        load(tmp_path, "val")


def test_a_folder_of_tars_that_is_no_split_is_not_left_out_in_silence(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.tar").touch()
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="folder 'valid' holds tars, but splits must be called train, val or test"):
        load(tmp_path)


def test_other_tars_are_split_by_each_id(tmp_path):
    write(tmp_path / "a.tar", tar_of((f"{n:04}.png", b"never read") for n in range(200)))
    parts = [load(tmp_path / "a.tar", split) for split in ("train", "val", "test")]
    assert sorted(i for part in parts for i in part.ids) == load(tmp_path / "a.tar").ids
    assert np.abs(np.array([len(part) for part in parts]) - [100, 40, 60]).max() < 20


def test_tars_of_one_name_in_two_folders_keep_their_folders(tmp_path):
    for folder in "xy":
        write(tmp_path / folder / "0.tar", shard(count=1))
    assert load(tmp_path / "{x,y}" / "0.tar").ids == ["x/0/00000", "y/0/00000"]


def test_our_own_shards_can_be_read(tmp_path):
    from patchrank.golden.shards import Sample, ShardFolder

    header = {"data": {"count": 2, "decoding": "plain"}, "shard_size": 64}
    folder = ShardFolder(str(tmp_path), header)
    images = [encoded(pixels(seed=n), "JPEG") for n in range(2)]
    scores = np.zeros((1, 4), np.float32)
    folder.write(0, [Sample(f"cat/{n}", content, n, scores, scores) for n, content in enumerate(images)])
    folder.finish()
    split = load(folder.path)
    assert [split.read(i) for i in range(2)] == images and split.labels == [0, 1] and split.captions is None


def test_nothing_is_ever_unpickled(tmp_path):
    bait = trap(tmp_path / "opened")
    names = ("pyd", "pkl", "pickle", "pth", "npy", "dill")
    members = [("a.png", encoded()), *((f"a.{name}", bait) for name in names), ("b.png", bait), ("b.cls", "0")]
    with pytest.raises(UserError, match="has no label"):
        load(write(tmp_path / "bait.tar", tar_of(members)))
    split = load(write(tmp_path / "bait.tar", tar_of(members[:-1])))
    kept = without_broken(split)
    assert kept.ids == ["bait/a"] and kept.skipped == 1 and kept.image(0).size == (12, 8)
    with pytest.raises(UserError, match="cls is not text in UTF-8"):
        load(write(tmp_path / "bait.tar", tar_of([("a.png", encoded()), ("a.cls", bait)])))
    assert not (tmp_path / "opened").exists()


def test_a_pipe_is_refused(tmp_path):
    for root in (f"pipe:mkdir {tmp_path}/ran", f"{tmp_path}/a.tar::pipe:mkdir {tmp_path}/ran"):
        with pytest.raises(UserError, match="pipe: would run a shell command, and is refused"):
            load(root)
    assert not (tmp_path / "ran").exists()


PNG = encoded()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty or cut off"),
        (b"<html>not found</html>" * 40, "is no tar"),
        (gzip.compress(shard(), mtime=0), "is packed with gzip"),  # with the time, two processes name it differently
        (tar_of([]), "holds no images"),
        (tar_of([("a.txt", "x"), ("b", PNG)]), "holds no images"),
        (tar_of([("a.png", PNG), ("a.png", PNG)]), "member a.png: key 'a' stands twice"),
        (tar_of([("a.png", PNG), ("b.png", PNG), ("a.jpg", PNG)]), "member a.jpg: key 'a' stands twice"),
        (tar_of([("a.png", PNG), ("a.jpg", PNG)]), r"sample 'a': holds 2 images \(png, jpg\)"),
        (
            tar_of([("a.1.png", PNG), ("a.2.png", PNG), ("a.cls", "1")]),
            r"'a': holds 2 images \(1.png, 2.png\), but one .cls for all, since a key ends at the first dot",
        ),
        (
            tar_of([("a.1.heic", PNG), ("b.txt", "x")]),
            r"holds no images; passed over: ending .heic \(1\), ending .txt \(1\); try members",
        ),
        (tar_of([("a.png", PNG), ("a.cls", "-1")]), "sample 'a': cls is '-1', but must be a class by its number"),
        (tar_of([("a.png", PNG), ("a.cls", " ")]), "sample 'a': cls is '', but must be"),
        (tar_of([("a.png", PNG), ("a.cls", "1"), ("b.png", PNG), ("b.cls", "x")]), "number 1, but at .* the name 'x'"),
        (
            tar_of([("a.png", PNG), ("a.cls", "2147483648")]),
            r"sample 'a': cls is the number 2147483648, .* below 2\*\*31",
        ),
        (tar_of([("a.png", PNG), ("a.cls", "9" * 9999)]), "cls is the number 9{40}, but classes are numbered from 0"),
        (tar_of([("a.png", PNG), ("a.cls", "1"), ("b.png", PNG)]), "sample 'b': has no label, but .*sample 'a' has"),
        (tar_of([("a.png", PNG), ("a.txt", "1"), ("b.png", PNG)]), "sample 'b': has no captions, but .*sample 'a' has"),
        (tar_of([("a.png", PNG), ("a.json", "{")]), "sample 'a': json is not readable"),
        (tar_of([("a.png", PNG), ("a.json", "[" * 100_000)]), "sample 'a': json is not readable"),
        (tar_of([("a.png", PNG), ("a.txt", "x" * (1 << 20) + "x")]), "member a.txt: is 1048577 bytes long"),
        (shard() + shard(4), "goes on after its end"),
    ],
)
def test_tars_that_cannot_be_used(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path / "x.tar", content))
    assert "x.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tar_cut_off_anywhere_is_never_taken_for_a_short_one(tmp_path):
    content = shard()
    end = len(content.rstrip(b"\0"))  # within the last member
    for size in [*range(1, end, 333), *range(512, end + 512, 512)]:
        with pytest.raises(UserError, match=r"cut\.tar.*(cut off|no tar)"):
            load(write(tmp_path / "cut.tar", content[:size]))
    assert len(load(write(tmp_path / "cut.tar", content[: -(-end // 512) * 512 + 1024]))) == 4


def test_a_cut_tar_names_the_member(tmp_path):
    path = write(tmp_path / "cut.tar", shard()[:3000])
    with pytest.raises(
        UserError, match=r"cut.tar, member 0000\d.(png|cls): is empty or cut off|cut.tar: is cut off after member"
    ):
        load(path)


def test_a_damaged_header_is_no_end(tmp_path):
    content = bytearray(shard())
    place = content.index(b"00002.cls")
    content[place + 148 : place + 156] = b"garbage!"
    with pytest.raises(UserError, match=f"is damaged after member 00001.png, at byte {place}"):
        load(write(tmp_path / "x.tar", bytes(content)))


def test_packed_tars_in_a_folder_are_told_of(tmp_path):
    write(tmp_path / "a.tar.gz", gzip.compress(shard()))
    with pytest.raises(UserError, match="a.tar.gz.*is packed with gzip, so that no image can be read alone"):
        load(tmp_path)


@pytest.mark.parametrize(
    "root, message",
    [
        (None, "data.root is missing: task 'wds' needs the path, URL or pattern"),
        ("none.tar", "none.tar: cannot be read as a tar .No such file"),
        ("none-{0..1}.tar", "none-0.tar: cannot be read as a tar"),
        ("none-*.tar", "no tar matches this pattern"),
        ("none-{0..1.tar", "cannot be filled in"),
        ("${NOWHERE}/a.tar", "cannot be filled in"),
        ("", "holds no .tar files, nor do folders train, val or test"),
        ("set/data-{000,000}.tar", "data-000.tar stands in it 2 times"),
    ],
)
def test_roots_that_name_no_tars(shards, root, message):
    with pytest.raises(UserError, match=message) as caught:
        load(root if root is None else shards.parent / root)
    assert "\n" not in str(caught.value)


def test_a_split_of_a_name_that_is_not_there(shards):
    with pytest.raises(UserError, match="split 'training' does not exist; did you mean 'train'"):
        load(shards, "training")


def test_what_lies_beside_tars_in_a_folder_is_counted(tmp_path, capsys):
    """As img2dataset leaves it: a table and statistics beside each tar."""
    for n in range(2):
        write(tmp_path / f"{n:05}.tar", shard(4 * n))
        write(tmp_path / f"{n:05}.parquet", b"PAR1")
        write(tmp_path / f"{n:05}_stats.json", "{}")
    write(tmp_path / "._00000.tar", b"of macOS")
    (tmp_path / "_tmp").mkdir()
    split = load_split("wds", root=str(tmp_path))
    beside = {"ending .json": 2, "ending .parquet": 2, "folders beside tars": 1, HIDDEN: 1}
    assert len(split) == 8 and split.passed_over == beside
    line = f"wds {tmp_path}: passed over what is no image by its name or place, 6 in all: ending .json (2), "
    assert line in capsys.readouterr().err


def test_what_lies_beside_the_tars_of_splits_is_counted(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split / "0.tar", shard())
        write(tmp_path / split / "nshards.txt", "1")
    write(tmp_path / "classnames.txt", "cat\ndog\n")
    (tmp_path / "notes").mkdir()
    assert load(tmp_path, "test").passed_over == {"ending .txt": 3, "folders beside tars": 1}


def test_hidden_and_system_folders_beside_splits_are_no_splits(tmp_path):
    write(tmp_path / "train" / "0.tar", shard())
    for name in ("@eaDir/0.tar", ".git/0.tar", "train/@eaDir/0.tar", "train/._0.tar"):
        write(tmp_path / name, shard())
    assert load(tmp_path, "train").passed_over == {HIDDEN: 4}


def test_members_of_all_tars_are_counted_together(tmp_path):
    for n in range(2):
        write(tmp_path / f"{n}.tar", tar_of([("a.png", encoded()), ("b.heic", b"x"), (".DS_Store", b"x")]))
    assert load(tmp_path / "{0..1}.tar").passed_over == {"ending .heic": 2, HIDDEN: 2}
