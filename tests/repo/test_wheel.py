"""The package as others install it: from a wheel, used in a folder that has nothing to do with the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SWEEPS = [path.stem for path in (ROOT / "sweeps").glob("*.yaml")]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "patchrank", "search_spaces", "sweeps")
LOOK = """
import json, sys, patchrank
from importlib.metadata import version
from patchrank.report import paper_rows
from patchrank.tune.sweep import load_sweep
axes = {name: sorted(load_sweep(name).axes) for name in sys.argv[1:]}
print(json.dumps({"file": patchrank.__file__, "version": version("patchrank-clip"), "axes": axes,
                  "paper": len(paper_rows("table7"))}))
"""


def run(*command: str | Path, folder: Path, **env: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))} | env
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, env=clean, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing an earlier build has left gets in; the network is not asked."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", dist]
    run(sys.executable, "-m", "pip", "wheel", source, *flags, folder=source)
    (built,) = dist.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A fresh environment with the wheel alone; all other packages are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    python = folder / "bin" / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).stdout.strip()
    seen = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(own) / "seen.pth").write_text("".join(f"{path}\n" for path in seen))  # whose own .pth files do not count
    flags = ["--no-deps", "--no-index", "--no-compile", "--ignore-installed"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *flags, wheel, folder=folder)
    return folder


def test_the_wheel_is_called_as_it_is_installed(wheel):
    assert wheel.name == "patchrank_clip-0.1.0-py3-none-any.whl"


def test_what_ships_is_found_from_another_folder(environment, tmp_path):
    found = json.loads(run(environment / "bin" / "python", "-c", LOOK, *SWEEPS, folder=tmp_path).stdout)
    assert Path(found["file"]).is_relative_to(environment) and found["version"] == "0.1.0"
    assert len(found["axes"]) > 7 and all(found["axes"].values()) and found["paper"] > 0


@pytest.mark.slow
def test_the_console_command_runs_a_stage_from_another_folder(environment, tmp_path):
    command = environment / "bin" / "patchrank"
    listed = run(command, folder=tmp_path).stdout
    assert listed == run(environment / "bin" / "python", "-m", "patchrank", folder=tmp_path).stdout
    assert "evaluate" in listed
    done = run(command, "evaluate", "--limit", "8", "--keep-rate", "0.6", folder=tmp_path, HF_HUB_OFFLINE="1")
    row = json.loads(done.stdout)
    assert row["n_images"] == 8 and row["accuracy"] > 50 and "accuracy, pruned" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # brings torch: minutes, gigabytes and the network
def test_the_wheel_brings_all_that_it_needs(wheel, tmp_path):
    folder, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    try:
        run(sys.executable, "-m", "venv", folder, folder=tmp_path)
        run(folder / "bin" / "pip", "install", "--quiet", wheel, folder=tmp_path)
        found = json.loads(run(folder / "bin" / "python", "-c", LOOK, *SWEEPS, folder=elsewhere).stdout)
        assert Path(found["file"]).is_relative_to(folder)
        flags = ["trial.data.tasks=[digits]", "trial.pruning.locations=[4, 6, 8, 10]", "trial.prompt=null", "--quick"]
        run(folder / "bin" / "patchrank", "tune", "locations", *flags, folder=elsewhere, HF_HUB_OFFLINE="1")
        assert (elsewhere / "runs/locations-quick/report.md").is_file()
    finally:
        shutil.rmtree(folder)
