"""Local paths and files: what no path can be, and what a file must not take the place of."""

import os

import pytest

from patchrank.io import read_bytes, resolve, write_atomic
from patchrank.utils.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("path", ["a\0b", "half \ud800 of a pair"])
@pytest.mark.parametrize("use", [read_bytes, resolve, lambda path: write_atomic(path, b"")])
def test_what_no_path_can_be_is_refused(use, path):
    with pytest.raises(UserError, match="^path '.*: cannot be used"):
        use(path)


def test_links_in_a_circle_and_homes_that_do_not_exist_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "inside", "~nobody-of-this-name/x"):
        with pytest.raises(UserError, match="cannot be used"):
            resolve(path)


def test_a_working_directory_that_is_gone_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="path 'runs': cannot be used"):
        resolve("runs")
    monkeypatch.undo()


def test_a_pipe_stays_a_pipe(tmp_path):
    """As must /dev/null, in whose place root could put a file; no test should try that."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(tmp_path / "pipe", "row")
    assert os.read(reader, 9) == b"row" and names(tmp_path) == ["pipe"]
    os.close(reader)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("place", ["x" * 300, "a/" * 1500 + "x", "file/below", "folder"])
def test_a_place_that_cannot_be_written_is_named_and_nothing_stays(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="^cannot write "):
        write_atomic(tmp_path / place, b"")
    assert names(tmp_path) == ["file", "folder"]
