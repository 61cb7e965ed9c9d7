"""The command `patchrank.repair`, and `--repair` of the stages that run a pruned pair."""

import json
from dataclasses import replace

import pytest
import torch

from patchrank import evaluate, repair
from patchrank.data.dataset_factory import load_split
from patchrank.models.clip import create_clip
from patchrank.prompt import __main__ as prompt
from patchrank.retrieval import main as retrieval
from patchrank.utils.errors import UserError

ASKED = ["--data", "digits", "--limit", "60", "--keep-rate", "0.3", "--locations", "4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file, and the row and the words of the command that made it."""
    path = str(tmp_path_factory.mktemp("repair") / "repair.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        rows = []
        patch.setattr(repair, "print_row", lambda row, title, lines, *_: rows.append((row, title, dict(lines))))
        repair.main([*ASKED, "--images", "150", "--out", path])
    return path, *rows[0]


def test_drift_falls_on_images_that_it_was_not_solved_on(made):
    path, row, title, lines = made
    assert row["split"] == "val" and row["n_images"] == 60 and row["n_repair_images"] == 150
    assert row["drift"] < row["drift_unrepaired"] and row["repair"] == path
    assert title.endswith("; repaired") and "without repair" in lines["drift (1 - cosine)"]
    assert {"accuracy", "accuracy_unrepaired", "agreement", "ridge", "seconds"} <= row.keys()


def test_stages_take_the_file_and_their_rows_say_so(made, capsys):
    path, made_row, *_ = made
    evaluate.main([*ASKED, "--repair", path])
    said = capsys.readouterr()
    row = json.loads(said.out)
    assert row["repair"] == path and row["cosine"] == pytest.approx(made_row["cosine"], abs=1e-7)
    assert row["gmacs"] == made_row["gmacs"] and "; repaired" in said.err
    retrieval([*ASKED, "--repair", path])
    assert json.loads(capsys.readouterr().out)["drift_mean"] == pytest.approx(made_row["drift"], abs=1e-6)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--keep-rate", "1"], "nothing to repair; try"),
        (["--budget", "1"], "nothing to repair; try"),
        (["--drop-counts", "0"], "nothing to repair; try"),
        (["--prompts", "p.safetensors"], "--prompts: a repair is solved for the tower without any"),
        (["--images", "20"], None),
        (["--reducer", "golden"], "oracle"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, told, tmp_path, capsys):
    out = tmp_path / "r.safetensors"
    with pytest.raises((UserError, SystemExit), match=told):
        repair.main([*ASKED, *flags, "--out", str(out)])
    assert not out.exists()


def test_prompts_are_not_tuned_beside_it(made):
    with pytest.raises(UserError, match="--repair: a repair is solved without prompts"):
        prompt.main([*ASKED, "--repair", made[0], "--loss", "distill", "--mode", "V"])
    with pytest.raises(UserError, match="solved for drops 45 before layer 4, but the pruning has drops 32 before"):
        evaluate.main([*ASKED, "--keep-rate", "0.5", "--repair", made[0]])


def test_prompts_are_not_tuned_by_an_oracle(tmp_path):
    asked = [*ASKED, "--reducer", "golden", "--loss", "distill", "--mode", "V"]
    with pytest.raises(UserError, match="--reducer golden ranks images that were scored"):
        prompt.main([*asked, "--out", str(tmp_path / "p.safetensors")])
    assert not list(tmp_path.iterdir())


def test_labels_are_never_read():
    clip = create_clip("patchrank_clip_digits", keep_rate=0.3, locations=(4,))
    train = load_split("digits", "adapt", 50)
    known, unknown = (repair.fit_repair(clip, [each], quiet=True) for each in (train, replace(train, labels=None)))
    assert torch.equal(known.weight, unknown.weight) and known.about == unknown.about


def test_a_budget_can_be_repaired(tmp_path, capsys):
    """As can counts: keep rate 1 is what flags say where something else decides."""
    free = ["--data", "digits", "--limit", "10", "--reducer", "attention_merge", "--budget", "0.6"]
    repair.main([*free, "--images", "50", "--out", str(tmp_path / "r.safetensors")])
    made = json.loads(capsys.readouterr().out)
    assert made["budget"] == 0.6 and made["n_repair_images"] == 50
    evaluate.main([*free, "--repair", str(tmp_path / "r.safetensors")])
    assert json.loads(capsys.readouterr().out)["cosine"] == pytest.approx(made["cosine"], abs=1e-7)


@pytest.mark.parametrize("main", [repair.main, prompt.main])
def test_help_offers_no_flag_that_the_stage_refuses(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert "--predictor" in told and "--repair FILE" not in told and "--prompts FILE" not in told
