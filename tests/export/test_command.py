"""The command `patchrank.export`: what it says, and the flags that it refuses."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers.image_files import trap, write
from helpers.toy_exports import refused

from patchrank.__main__ import STAGES
from patchrank.export import __main__ as started
from patchrank.export import command
from patchrank.export import write as exporting
from patchrank.export.command import main
from patchrank.models.captions import template_set
from patchrank.utils.errors import UserError

TOY = ("--keep-rate", "0.6", "--out", "x.onnx")
CHECK = ("--check", "x.onnx")


def test_it_says_what_it_wrote(answering):
    row = answering.made
    assert row["file"] == answering.onnx and row["int8"] == answering.int8 and row["model"].startswith("open_clip:toy@")
    assert row["schedule"] == [[1, 8]] and row["num_patches"] == [16, 8]
    assert row["classes"] == list(answering.classes) and row["outputs"] == ["probabilities", "embedding", "kept"]
    assert "choices" not in row


def test_the_command_that_it_ends_with_checks_the_file(answering, capsys):
    *_, last = answering.told.splitlines()
    words = shlex.split(last)
    assert words[:4] == ["try", "python", "-m", "patchrank.export"] and "--checkpoint" in words
    assert main([*words[4:], "--limit", "8"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["file"] == answering.onnx and row["passed"] and row["n_images"] == 8


def test_of_a_tower_that_loses_nothing_the_table_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "trace", lambda *args: None)
    monkeypatch.setattr(exporting.program_file, "save", lambda *args: b"")
    path = str(tmp_path / "x.pt2")
    assert main(["--out", path]) == 0
    told = capsys.readouterr().err
    assert "64, 64 of them at the end; none leaves, so try --keep-rate 0.6" in told
    assert told.splitlines()[-1] == f"  try python -m patchrank.export --check {path}"  # which says its model
    assert main(["--out", path, "--keep-rate", "0.6"]) == 0
    assert "none leaves" not in capsys.readouterr().err


def test_files_pass_beside_their_tower(answering, photos, capsys):
    speed = ["--speed", "--repeats", "2", "--batch-size", "4", "--threads", "1"]
    assert main([*answering.flags, "--check", answering.onnx, answering.int8, *photos, *speed]) == 0
    said = capsys.readouterr()
    exact, small, *speeds = map(json.loads, said.out.splitlines())
    assert exact["passed"] and exact["same_kept"] == exact["same_class"] == exact["n_images"] == 12
    assert exact["embedding_apart"] < 1e-5 and exact["accuracy"] == exact["accuracy_tower"]
    assert "passed" not in small and 1e-7 < small["drift"] < 0.05 and small["bytes"] < exact["bytes"]
    assert "the same class as the tower" in said.err and "speed at batch size 4, medians of 2 turns" in said.err
    check_speeds(speeds, answering)


def check_speeds(rows, answering):
    files = [row["file"] for row in rows]
    assert files[:2] == [answering.onnx, answering.int8] and files[2].startswith("torch, open_clip:toy@")
    assert len(rows) == 3 and rows[0]["speedup"] == 1  # one row for the tower of both
    for row in rows:
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["ms_per_image"] <= high and row["batch_size"] == 4 and row["hardware"]
        assert row["speedup"] == pytest.approx(rows[0]["ms_per_image"] / row["ms_per_image"])


def test_classes_of_other_names_are_not_counted_as_right(answering, photos, capsys):
    assert main([*answering.flags, "--check", answering.onnx, *photos[:4]]) == 0
    row = json.loads(capsys.readouterr().out)
    assert "accuracy" not in row and row["same_class"] == 12


@pytest.mark.parametrize(
    "flags, told",
    [
        ([], "--out is missing"),
        ([*TOY, "--data", "digits"], "--data goes with --check, which is not given"),
        ([*TOY, "--data-root", "d"], "--data-root goes with --check"),
        ([*TOY, "--split", "val"], "--split goes with --check"),
        ([*TOY, "--limit", "3"], "--limit goes with --check"),
        ([*TOY, "--batch-size", "3"], "--batch-size goes with --check"),
        ([*TOY, "--speed"], "--speed goes with --check"),
        ([*TOY, "--threads", "1"], "--threads goes with --check"),
        ([*TOY, "--repeats", "3"], "--repeats goes with --check"),
        ([*TOY, "--compile"], "--compile goes with --check"),
        ([*CHECK, "--compile"], "--compile goes with --speed"),
        ([*CHECK, "--speed", "--compile"], "--compile is of .pt2 files, and --check names none; try it without"),
        ([*CHECK, "--out", "y.onnx"], "--out does not go with --check, which goes by what the file says"),
        ([*CHECK, "--keep-rate", "0.6"], "--keep-rate does not go with --check"),
        ([*CHECK, "--reducer", "evit"], "--reducer does not go with --check"),
        ([*CHECK, "--locations", "3"], "--locations does not go with --check"),
        ([*CHECK, "--img-size", "32"], "--img-size does not go with --check"),
        ([*CHECK, "--classes", "cat"], "--classes does not go with --check"),
        ([*CHECK, "--templates", "{}"], "--templates does not go with --check"),
        ([*CHECK, "--uint8"], "--uint8 does not go with --check"),
        ([*CHECK, "--int8", "y.onnx"], "--int8 does not go with --check"),
        ([*CHECK, "--format", "onnx"], "--format does not go with --check"),
        ([*CHECK, "--device", "cuda"], "--device cuda: files are traced and checked on the CPU"),
        ([*TOY, "--device", "cuda"], "--device cuda: files are traced and checked on the CPU"),
        ([*TOY, "--format", "pt2"], "--out x.onnx: a file of format pt2 ends in .pt2"),
        ([*TOY, "--format", "tflite"], "invalid choice: 'tflite'"),
        (["--out", "x.bin"], "x.bin: an exported file ends in .onnx or .pt2"),
        (["--out", "x.pt2", "--int8", "y.onnx"], "--int8 y.onnx: is of ONNX alone"),
        ([*TOY, "--int8", "x.onnx"], "is where the file in float32 goes"),
        ([*TOY, "--classes", "cat", "--vocabulary", "v.yaml"], "--classes and --vocabulary exclude each other"),
        ([*TOY, "--vocabulary", "v.yaml"], "v.yaml: cannot be read"),
        ([*TOY, "--templates", "a {}"], "--templates goes with --classes or --vocabulary"),
        ([*TOY, "--classes", "cat", "--templates", "openai8"], "openai8"),
        ([*TOY, "--classes", "cat", "--templates", "a {} {}"], "a {} {}"),
        ([*TOY, "--classes", "cat", "--templates", "a cat"], "'a cat': must be a sentence with {} for the class, or"),
        ([*TOY, "--classes", ""], "''"),
        ([*TOY, "--model", "patchrank_clip_digit"], "model 'patchrank_clip_digit' does not exist"),
        ([*TOY, "--model", "patchrank_clip_digit", "--classes", "cat"], "'patchrank_clip_digit' does not exist"),
        ([*TOY, "--reducer", "center", "--checkpoint", "none.safetensors"], "none.safetensors"),
        ([*TOY, "--predictor", "none.safetensors"], "none.safetensors"),
        ([*TOY, "--repair", "none.safetensors"], "none.safetensors"),
        ([*TOY, "--prompts", "none.safetensors"], "none.safetensors"),
        ([*TOY, "--reducer", "golden"], "golden"),
        ([*TOY, "--reducer", "random"], "reducer 'random' reads the bits of pixels"),
        ([*TOY, "--reducer", "evit", "--predictor", "p"], "reducer 'evit' reads none"),
        ([*TOY, "--out", f"{__file__}/x.onnx"], "test_command.py"),
        ([*TOY, "--out", "/proc/x.onnx"], "cannot write /proc/x.onnx ("),
        ([*TOY, "--int8", "y" * 260 + ".onnx"], "yyy.onnx (File name too long); try another folder or name"),
        (["--check", "none.onnx"], "none.onnx: there is no such file"),
        (["--check", "none.pt2"], "none.pt2: cannot be read"),
        (["--check", "none.txt"], "none.txt: an exported file ends in .onnx or .pt2"),
        (["--image", "x.png"], "--check"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_nothing_is_written(flags, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert told in refused(flags, capsys)
    assert not list(tmp_path.iterdir())


SEVEN = template_set("openai7")


@pytest.mark.parametrize(
    "flags, classes, templates",
    [
        ([], (), exporting.TEMPLATES),
        (["--classes", "cat", "dog"], ["cat", "dog"], exporting.TEMPLATES),
        (["--classes", "cat", "--templates", "a {}", "{}!"], ["cat"], ["a {}", "{}!"]),
        (["--classes", "cat", "--templates", "openai7"], ["cat"], SEVEN),
        (["--vocabulary", "list.yaml"], ("cat", "dog"), ("my {}",)),
        (["--vocabulary", "list.yaml", "--templates", "openai7"], ("cat", "dog"), SEVEN),
        (["--vocabulary", "names.yaml"], ("cat", "dog"), exporting.TEMPLATES),
    ],
)
def test_classes_and_templates_come_from_flags_or_a_vocabulary(
    flags, classes, templates, tmp_path, monkeypatch, capsys
):
    write(tmp_path / "list.yaml", "classes: [cat, dog]\ntemplates: ['my {}']")
    write(tmp_path / "names.yaml", "classes: {n1: cat, n2: dog}")

    def export_tower(clip, out, found, of_names, *others, **how):
        assert (list(found), list(of_names)) == (list(classes), list(templates))
        raise UserError("as asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "export_tower", export_tower)
    assert refused([*TOY, *flags], capsys) == "error: as asked\n"


@pytest.mark.slow
def test_embeddings_alone_are_exported_and_checked_without_open_clip(tmp_path):
    code = "import sys\nfor name in ('ray', 'webdataset', 'open_clip', 'optuna'):\n    sys.modules[name] = None\n"
    code += "from patchrank.export.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    path = str(tmp_path / "x.pt2")
    for flags in (["--keep-rate", "0.6", "--out", path], ["--check", path, "--limit", "8"]):
        subprocess.run([sys.executable, "-c", code, *flags], check=True)


def test_a_vocabulary_without_classes_names_none(tmp_path, capsys):
    path = write(tmp_path / "v.yaml", "templates: ['a {}']")
    told = refused(["--out", tmp_path / "x.onnx", "--vocabulary", path], capsys)
    assert "v.yaml: classes: has none, which a file needs to name them" in told


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize("content", [b"", b"no model", trap("/never")])
def test_what_is_no_exported_file_is_refused(ending, content, tmp_path, capsys):
    path = write(tmp_path / f"x.{ending}", content)
    assert str(path) in refused(["--check", path], capsys)


def test_templates_beside_learned_text_are_refused(files, tmp_path, capsys):
    flags = ["--out", tmp_path / "x.pt2", "--keep-rate", "0.6", "--locations", "2", "--img-size", "48"]
    flags += [word for kind in ("checkpoint", "predictor", "prompts") for word in (f"--{kind}", files[kind])]
    flags += ["--classes", "cat", "--templates", "a {}"]
    assert "--templates say nothing where --prompts have learned text; try it without" in refused(flags, capsys)
    assert not list(tmp_path.iterdir())


def test_a_config_of_ones_own_is_asked_for(answering, tmp_path, capsys):
    path = shutil.copy(answering.onnx, tmp_path / "x.onnx")
    assert "a config of somebody's own; try --model open_clip:CONFIG.json" in refused(["--check", path], capsys)


@pytest.mark.parametrize("flags, told", [([], "--keep-rate"), (["--image", "x.png"], "--check FILE")])
def test_help_shows_flags_and_examples(flags, told, capsys):
    with pytest.raises(SystemExit) as caught:
        started.main([*flags, "--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0 and told in said and "usage: python -m patchrank.export" in said


def test_it_is_a_stage_like_others():
    assert "export" in STAGES
