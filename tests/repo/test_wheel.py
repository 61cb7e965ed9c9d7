"""The package as others install it: from a wheel, and from one that its sdist builds, used in a folder elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SWEEPS = [path.stem for path in (ROOT / "sweeps").glob("*.yaml")]
IGNORED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
BUILD = "import sys; from hatchling.build import build_sdist; build_sdist(sys.argv[1])"
LOOK = """
import json, sys, timm, patchrank
from importlib.metadata import version
from patchrank.report import paper_rows
from patchrank.tune.sweep import load_sweep
axes = {name: sorted(load_sweep(name).axes) for name in sys.argv[1:]}
print(json.dumps({"file": patchrank.__file__, "version": version("patchrank-clip"), "axes": axes,
                  "paper": len(paper_rows("table7")),
                  "entry": type(timm.create_model("patchrank_clip_digits", pretrained=True)).__name__}))
"""


def run(*command: str | Path, folder: Path, **env: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))} | env
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, env=clean, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository, so that nothing an earlier build has left gets in."""
    folder = tmp_path_factory.mktemp("source") / "patchrank"
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *IGNORED))


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel of a folder or an sdist; the network is not asked."""
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", source, *flags, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", BUILD, folder, folder=source)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module", params=["wheel", pytest.param("sdist", marks=pytest.mark.slow)])
def environment(request, tmp_path_factory):
    """A fresh environment with a wheel alone; all other packages are those of this one."""
    folder, wheel = tmp_path_factory.mktemp("environment"), request.getfixturevalue(request.param)
    wheel = build_wheel(wheel, tmp_path_factory.mktemp("built")) if request.param == "sdist" else wheel
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


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    def contents(path):
        with zipfile.ZipFile(path) as archive:
            return {info.filename: info.CRC for info in archive.infolist()}

    assert sdist.name == "patchrank_clip-0.1.0.tar.gz"
    assert contents(build_wheel(sdist, tmp_path)) == contents(wheel)


@pytest.mark.slow
def test_the_sdist_has_all_that_its_pages_and_tests_name(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    tests = [f"tests/repo/test_{name}.py" for name in ("readme", "floors", "private_names")]
    run(sys.executable, "-m", "pytest", "-n", "0", *tests, folder=folder)


def test_what_ships_is_found_from_another_folder(environment, tmp_path):
    found = json.loads(run(environment / "bin" / "python", "-c", LOOK, *SWEEPS, folder=tmp_path).stdout)
    assert Path(found["file"]).is_relative_to(environment) and found["version"] == "0.1.0"
    assert len(found["axes"]) > 7 and all(found["axes"].values()) and found["paper"] > 0
    assert found["entry"] == "PrunedVisionTransformer"


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
