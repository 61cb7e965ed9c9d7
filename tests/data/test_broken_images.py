import errno
from dataclasses import replace

import pytest
from helpers.image_files import encoded, pixels, trap, write

from patchrank.data.broken_images import fingerprinted, without_broken
from patchrank.data.image_split import Reader
from patchrank.data.readers.folder import load_folder
from patchrank.utils.errors import UserError
from patchrank.utils.progress import write_once


@pytest.fixture(autouse=True)
def _nothing_was_told():
    write_once.cache_clear()


def load(root, split="all"):
    return load_folder("folder", split, str(root))


@pytest.fixture
def many(tmp_path):
    """Writes 40 images, those named broken in several ways."""

    def make(*broken):
        good = encoded(pixels(32, 32), "JPEG")
        ways = [good[: len(good) // 2], b"", b"text", trap(tmp_path / "opened")]
        for n in range(40):
            write(tmp_path / "many" / f"{n:02}.jpg", ways[broken.index(n) % 4] if n in broken else good)
        return load(tmp_path / "many")

    return make


def test_one_broken_image_is_left_out_and_told_of(many, capsys):
    split = without_broken(many(3), 10)
    assert split.ids == [f"{n:02}.jpg" for n in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10)] and split.skipped == 1
    told = capsys.readouterr().err
    assert told.startswith("folder/all: left out 03.jpg: image file is truncated") and told.count("\n") == 1
    assert split.image(9).size == (32, 32)
    without_broken(many(3), 10)  # as a run reads its images again
    assert capsys.readouterr().err == ""


def test_only_as_many_images_are_looked_at_as_it_takes(many):
    split, seen = many(3), []
    split = replace(split, read=Reader(lambda i, read=split.read: seen.append(i) or read(i), range(40)))
    assert len(without_broken(split, 10)) == 10 and sorted(seen) == list(range(11))
    assert len(without_broken(split, None)) == len(without_broken(split, 1000)) == 39


def test_too_many_broken_images_stop_the_run(many, capsys, tmp_path):
    split = many(3, 5, 7, 35)
    with pytest.raises(UserError) as caught:
        without_broken(split, 20)
    said = str(caught.value)
    assert said.startswith(
        "data folder/all: 3 of 20 images cannot be decoded, but one image, or 1 % of those looked at"
    )
    assert "the first is 03.jpg (image file is truncated" in said and "\n" not in said
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in told] == ["left out 03.jpg", "left out 05.jpg", "left out 07.jpg"]
    assert told[1].endswith("the file is empty") and told[2].endswith("in no image format that can be read")
    assert (
        without_broken(split, 20, share=0.15).skipped == 4 - 1 and without_broken(split, None, share=0.1).skipped == 4
    )
    with pytest.raises(UserError, match="4 of 40 images .* but one image, or 9 % of"):
        without_broken(split, None, share=0.09)
    assert not (tmp_path / "opened").exists()


def test_with_a_share_of_zero_no_image_may_be_broken(many):
    with pytest.raises(UserError, match="1 of 10 images cannot be decoded, but none may be broken"):
        without_broken(many(3), 10, share=0)
    assert without_broken(many(), 10, share=0).skipped == 0


def test_something_must_be_left(tmp_path):
    write(tmp_path / "x.png", b"")
    with pytest.raises(UserError, match="1 of 1 images cannot be decoded, but at least one must be left"):
        without_broken(load(tmp_path), None)


def test_beyond_twenty_broken_images_a_count_is_told(many, capsys):
    assert without_broken(many(*range(5, 30)), None, share=0.7).skipped == 25
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 21 and told[-1] == "folder/all: left out 5 more"


def test_missing_files_of_a_csv_are_broken_images(tmp_path):
    for name in ("a.png", "b.png"):
        write(tmp_path / name, encoded())
    split = without_broken(load(write(tmp_path / "list.csv", "path\na.png\nb.png\nc.png\n")), None)
    assert split.ids == ["a.png", "b.png"] and split.skipped == 1
    with pytest.raises(UserError, match=r"2 of 4 .* first is c.png \(cannot be read \(No such file or directory\)\)"):
        without_broken(load(write(tmp_path / "list.csv", "path\na.png\nb.png\nc.png\nd.png\n")), None)


def test_paths_that_cannot_lead_to_a_file_are_broken_images(tmp_path):
    write(tmp_path / "a.png", encoded())
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    split = without_broken(
        load(write(tmp_path / "list.csv", f"path\na.png\nb.png\n{'c' * 300}.png\n")), None, share=0.7
    )
    assert split.ids == ["a.png"] and split.skipped == 2


class Refused(Exception):
    """As a web server's refusal comes: no OSError."""


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (ConnectionResetError("the peer\nis gone"), "the peer is gone"),
        (TimeoutError(), "TimeoutError"),
        (Refused("403, message='Forbidden'"), "403, message='Forbidden'"),
    ],
)
def test_an_image_that_hides_for_now_stops_the_run_and_is_not_called_broken(many, capsys, error, said):
    def fetch(i):
        if i == 2:
            raise error
        return split.read(i)

    split = many()
    hidden = replace(split, read=Reader(fetch, range(40)))
    with pytest.raises(UserError) as caught:
        without_broken(hidden, 10)
    name = f"folder/all: image 02.jpg cannot be read ({said})"
    assert str(caught.value) == f"{name}; it is not left out as broken, since it may be readable later"
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="^folder/all: image 02.jpg cannot be read") as caught:
        hidden.image(2)
    assert str(caught.value) == name


def test_a_url_of_an_unknown_kind_is_told_as_it_is(tmp_path):
    write(tmp_path / "a.png", encoded())
    with pytest.raises(UserError, match=r"^bad://b.png: fsspec cannot open this kind of URL \([^\n]*\)$"):
        without_broken(load(write(tmp_path / "list.csv", "path\na.png\nbad://b.png\n")))


def test_a_fingerprint_reads_at_most_64_images_from_the_first_to_the_last(many):
    split, seen = many(), []
    long = replace(split.take([0] * 1000), read=Reader(lambda i: seen.append(i) or b"x", range(1000)))
    fingerprinted(long)
    assert (
        len(seen) == 64 and {0, 999} <= set(seen) and 15 <= min(b - a for a, b in zip(sorted(seen), sorted(seen)[1:]))
    )
    for count in (1, 2, 5):
        seen.clear()
        fingerprinted(long.first(count))
        assert sorted(seen) == list(range(count))


def test_other_images_by_the_same_names_are_another_version(tmp_path):
    versions = []
    for n, seed in enumerate([0, 0, 1]):
        write(tmp_path / str(n) / "x.png", encoded(pixels(seed=seed)))
        split = without_broken(load(tmp_path / str(n)))
        versions.append(split.ids_sha256())
    assert versions[0] == versions[1] != versions[2]


def test_the_verdicts_are_in_order_whatever_the_threads_do(tmp_path):
    for n in range(60):
        size = 4 if n % 2 else 300
        write(tmp_path / f"{n:02}.png", encoded(pixels(size, size)) if n % 20 else b"broken")
    split = without_broken(load(tmp_path), 50, share=0.1)
    assert split.ids == [f"{n:02}.png" for n in range(60) if n % 20][:50] and split.skipped == 3
