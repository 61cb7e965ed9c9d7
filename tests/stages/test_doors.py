"""Ways in: `python -m patchrank`, `patchrank STAGE` and `python -m patchrank.STAGE`."""

import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import patchrank
from patchrank.__main__ import STAGES, main

PACKAGE = Path(patchrank.__file__).parent


@pytest.fixture
def without_torch(tmp_path):
    """Runs a module where whoever imports torch or timm ends the process with status 7."""
    for name in ("torch", "timm"):
        (tmp_path / f"{name}.py").write_text("import os, sys\nsys.stderr.flush()\nos._exit(7)\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)

    return run


def test_stages_are_listed_without_torch(without_torch):
    done = without_torch("-m", "patchrank")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[3:]] == list(STAGES)
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_stage_that_does_not_exist_is_told_in_one_line(without_torch):
    done = without_torch("-m", "patchrank", "evalute")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: stage 'evalute' does not exist; did you mean 'evaluate'? known: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_sweep_says_something_before_it_imports_torch(without_torch):
    done = without_torch("-m", "patchrank.tune", "sweeps/locations.yaml")
    assert (done.returncode, done.stderr) == (7, "reading sweeps/locations.yaml ...\n")


def test_importing_the_package_registers_its_models(without_torch):
    assert without_torch("-c", "import patchrank").returncode == 7


@pytest.mark.parametrize(
    "argv, orig_argv, expected",
    [
        (["-m"], ["python", "-m", "patchrank"], True),
        (["-m"], ["python", "-X", "dev", "-m", "patchrank.fit", "--lr", "1"], True),
        (["-m"], ["python", "-m", "my_training", "-m", "patchrank"], False),
        (["-m"], ["python", "-m", "patchrankings"], False),
        (["-m"], ["python", "-mpatchrank"], False),  # slower, no more
        (["/opt/env/bin/patchrank", "fit"], ["python", "/opt/env/bin/patchrank", "fit"], True),
        (["train.py", "-m", "patchrank"], ["python", "train.py", "-m", "patchrank"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_commands_are_known_by_how_python_was_started(monkeypatch, argv, orig_argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert patchrank._is_command() is expected


def test_every_command_is_a_stage():
    guarded = [path for path in PACKAGE.rglob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
    found = {path.parent.name if path.name == "__main__.py" else path.stem for path in guarded}
    assert found - {PACKAGE.name} == set(STAGES)


def ended(monkeypatch, capsys, argv: list[str], run) -> tuple[object, str, str]:
    """Exit status, stdout and stderr of a command that ends this process."""
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as caught:
        run()
    return caught.value.code, *capsys.readouterr()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("stage", STAGES)
def test_both_doors_of_a_stage_lead_to_the_same(stage, monkeypatch, capsys):
    status, said, told = ended(monkeypatch, capsys, ["patchrank", stage, "--help"], main)
    assert said.startswith(f"usage: python -m patchrank.{stage} ") and (status, told) == (0, "")
    assert f"patchrank.{stage} " in said.split("\n\n", 1)[1]  # an example
    python_m = partial(runpy.run_module, f"patchrank.{stage}", run_name="__main__", alter_sys=True)
    assert ended(monkeypatch, capsys, ["x", "--help"], python_m) == (status, said, told)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_bad_input_ends_with_status_2_through_the_door_too(monkeypatch, capsys):
    status, said, told = ended(monkeypatch, capsys, ["patchrank", "retrieval", "--data", "digit"], main)
    assert (status, said) == (2, "") and told.startswith("error: ") and "did you mean 'digits'" in told


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_starts_in_a_python_of_its_own(stage):
    """Above all stages share a process, where one may lean on what another has imported."""
    done = subprocess.run([sys.executable, "-m", f"patchrank.{stage}", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and f"patchrank.{stage}" in done.stdout


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_console_command_finds_modules_where_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/opt/env/bin", *sys.path])
    ended(monkeypatch, capsys, ["/opt/env/bin/patchrank", "fit", "--help"], main)
    assert str(tmp_path) in sys.path
