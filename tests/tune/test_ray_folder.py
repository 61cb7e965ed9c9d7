"""Where Ray keeps its sessions: where it would by itself, unless it could not work there."""

import os
import stat
import tempfile

import pytest

from patchrank.tune.ray_folder import LONGEST, fault_of, ray_folder
from patchrank.utils.errors import UserError


@pytest.fixture
def tmpdir_of(monkeypatch):
    """Sets TMPDIR; RAY_TMPDIR is not set."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return lambda folder: monkeypatch.setenv("TMPDIR", str(folder))


@pytest.fixture
def short(tmp_path_factory):
    """A folder that will do, which pytest's own may not, since it lies below a long name."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield folder


def test_a_folder_that_will_do_is_left_alone(tmpdir_of, short, capsys):
    tmpdir_of(short)
    with ray_folder():
        assert "RAY_TMPDIR" not in os.environ
    assert capsys.readouterr().err == ""


def test_a_long_tmpdir_is_replaced_for_ray_alone_by_a_private_folder(tmpdir_of, tmp_path, capsys):
    slurm = tmp_path / "scratch/slurm/job.1234567" / ("of-a-user-with-a-long-name" * 4)
    slurm.mkdir(parents=True)
    tmpdir_of(slurm)
    with ray_folder():
        folder = os.environ["RAY_TMPDIR"]
        assert fault_of(folder) is None and stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert os.environ["TMPDIR"] == str(slurm)
    assert "RAY_TMPDIR" not in os.environ and not os.path.exists(folder)
    told = capsys.readouterr().err
    assert told.startswith(f"note: TMPDIR={slurm}: ") and f"{LONGEST} are allowed" in told and folder in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("folder", ["", "relative", "/proc/none", "/dev/null", "/tmp/é"])
def test_so_is_one_that_ray_could_not_work_in(tmpdir_of, folder, capsys):
    tmpdir_of(folder)
    with pytest.raises(KeyError), ray_folder():
        assert fault_of(os.environ["RAY_TMPDIR"]) is None
        raise KeyError("the environment is as it was after errors, too")
    assert "RAY_TMPDIR" not in os.environ and f"TMPDIR={folder}: " in capsys.readouterr().err


def test_what_a_user_chose_for_ray_is_kept_or_refused(monkeypatch, short, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.setenv("TMPDIR", "/proc/none")
    with ray_folder():
        assert os.environ["RAY_TMPDIR"] == short
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("y" * 30)))
    with pytest.raises(UserError, match="RAY_TMPDIR=.*bytes.*try a short folder"), ray_folder():
        pytest.fail("it was taken")
    assert os.environ["RAY_TMPDIR"] == str(tmp_path / ("y" * 30))
