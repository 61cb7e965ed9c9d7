"""How commands end: an exit status and one line, whatever went wrong; and a traceback for faults of ours."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import patchrank
from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError
from patchrank.utils.startup import INTERRUPTED


def fails(error):
    def main():
        raise error

    return main


def ended(main) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code


@pytest.mark.parametrize(
    "main, line",
    [
        (fails(UserError("keep_rate is 2;\n  try 1")), "keep_rate is 2; try 1"),
        (lambda: Path("no/such/file").read_text(), "no/such/file: No such file or directory"),
        (lambda: os.listdir(__file__), f"{__file__}: Not a directory"),
        (lambda: open("x" * 300), f"{'x' * 300}: File name too long"),
        (fails(OSError(28, "No space left on device")), "No space left on device"),
        (fails(MemoryError()), "out of memory (MemoryError); try a smaller --batch-size or --limit"),
        (fails(torch.OutOfMemoryError("CUDA out of memory.")), "out of memory (CUDA out of memory.); try a smaller"),
        (lambda: torch.empty(2**60, dtype=torch.uint8), "out of memory ("),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_status_2(main, line, capsys):
    assert ended(main) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {line}") and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    "error", [AttributeError("ours"), OSError("from a library"), RecursionError(), RuntimeError("shapes"), KeyError(1)]
)
def test_a_fault_of_ours_shows_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(fails(error))


def test_interrupts_end_with_130_and_failed_trials_with_1(capsys):
    assert ended(fails(KeyboardInterrupt())) == 130 and capsys.readouterr().err == f"{INTERRUPTED}\n"
    assert (ended(lambda: 1), ended(lambda: 0), ended(lambda: None)) == (1, 0, 0)


def test_a_result_that_cannot_be_printed_is_told(monkeypatch, capsys):
    """On a full disk, and where the reader of a pipe has gone; Python would tell both at its end, with a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    for place, reason in ((os.open("/dev/full", os.O_WRONLY), "No space left on device"), (writer, "Broken pipe")):
        monkeypatch.setattr(sys, "stdout", os.fdopen(place, "w", closefd=False))
        assert ended(lambda: print("row")) == 2
        assert capsys.readouterr().err == f"error: stdout: {reason}; try --out, where there is one\n"
        os.close(place)


def test_any_name_can_be_printed(monkeypatch):
    """Names of classes and files in a terminal that knows ASCII alone, and files whose names are no text."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert ended(lambda: print("Übersee", os.fsdecode(b"caf\xe9"))) == 0
    assert printed.getvalue() == b"\\xdcbersee caf\xe9\n"


def test_streams_that_are_closed_harm_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert ended(lambda: print("row", file=sys.stderr)) == 0


def run(folder: Path, *arguments: str, **how) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder), str(Path(patchrank.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path} | how
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("door", [["-m", "patchrank.evaluate"], ["-m", "patchrank", "fit"]])
def test_ctrl_c_while_libraries_load_is_one_line(tmp_path, door):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    done = run(tmp_path, *door)
    assert (
        done.returncode in (130, -2) and done.stderr == f"{INTERRUPTED}\n"
    )  # -2: by the signal, which a shell calls 130


@pytest.mark.parametrize("door", ["patchrank", "patchrank.evaluate", "patchrank.tune"])
def test_a_working_directory_that_is_gone_is_told(tmp_path, door):
    away = f'mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec "$0" -m {door}'
    environment = os.environ | {"PYTHONPATH": str(Path(patchrank.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", away, sys.executable], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: working directory: No such file or directory; try cd to another\n"


def test_a_library_that_does_not_load_shows_its_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('a broken installation')\n")
    done = run(tmp_path, "-m", "patchrank.evaluate")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a broken installation" in done.stderr
