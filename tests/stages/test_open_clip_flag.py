"""Every command takes `--model open_clip:CONFIG.json --checkpoint FILE`, and says the same stable name."""

import json

import pytest
from helpers.open_clip_files import write_model

from patchrank import benchmark, evaluate, fit, retrieval
from patchrank.golden import __main__ as golden
from patchrank.golden.shards import read_manifest
from patchrank.layers.predictors import load_predictor
from patchrank.models.model_name import stable_name
from patchrank.models.prompt_files import load_prompts
from patchrank.prompt import __main__ as prompt
from patchrank.utils.errors import UserError
from patchrank.visualize import __main__ as visualize

AT = ["--locations", "2"]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a command on the toy model; gives what it prints: a row, or a path."""
    name, checkpoint = write_model(tmp_path)

    def command(stage, *flags):
        stage.main(["--model", name, "--checkpoint", checkpoint, *map(str, flags)])
        said = capsys.readouterr().out.splitlines()[-1]
        if not said.startswith("{"):
            return said
        row = json.loads(said)
        assert row.get("model", stable_name(name)) == stable_name(name)
        return row

    return command


def test_all_stages_from_golden_scores_to_prompts(run, tmp_path):
    out = tmp_path / "out"
    made = {}
    for split in ("adapt", "val"):
        scoring = ["--window", 2, "--stride", 2, "--remove-at", 2, "--out", out / "shards"]
        made[split] = run(golden, "--split", split, "--limit", 6, *scoring)
        assert read_manifest(made[split])["model"]["name"].startswith("open_clip:toy@")
    shards = ["--shards", made["adapt"], "--val-shards", made["val"]]
    fitted = ["--location", 2, "--epochs", 2, "--out", out / "predictor.safetensors"]
    assert run(fit, *shards, *fitted)["matching_rate"] > 0
    assert load_predictor(out / "predictor.safetensors")[1]["model"]["name"].startswith("open_clip:toy@")
    pruning = [*AT, "--keep-rate", 0.5, "--predictor", out / "predictor.safetensors"]
    row = run(evaluate, "--split", "val", "--limit", 6, *pruning, "--shards", made["val"])
    assert row["gmacs"] < row["gmacs_unpruned"] and row["n_images"] == 6 and row["cosine"] < 1
    assert run(retrieval, "--split", "val", "--limit", 12, *pruning)["drift_mean"] > 0
    assert run(benchmark, *pruning, "--batch-size", 2, "--repeats", 3)["ms"] > 0
    ranks = ["--rank", "random", "predictor", "--predictor", out / "predictor.safetensors", "--keep-rates", 0.5]
    picture = run(visualize, *AT, "--limit", 1, *ranks, "--remove-at", 2, "--out", out / "picture.png")
    assert open(picture, "rb").read(4) == b"\x89PNG"
    tuning = ["--mode", "TV", "--epochs", 1, "--shots", 1, "--num-tokens", 2, "--out", out / "prompts.safetensors"]
    assert run(prompt, *pruning, *tuning, "--split", "val", "--limit", 6)["n_seen_images"] == 10
    assert load_prompts(out / "prompts.safetensors")[1]["model"]["name"].startswith("open_clip:toy@")
    row = run(evaluate, "--split", "val", "--limit", 6, *pruning, "--prompts", out / "prompts.safetensors")
    assert row["gmacs"] > 0


def test_files_of_another_model_are_refused(run, tmp_path):
    shards = run(golden, "--split", "val", "--limit", 2, "--remove-at", 2, "--out", tmp_path / "shards")
    with pytest.raises(UserError, match="computed from open_clip:toy@.* but this model is patchrank_clip_digits"):
        evaluate.main(["--split", "val", "--limit", "2", "--keep-rate", "0.5", "--shards", shards])


def test_milliseconds_need_no_weights(tmp_path, capsys):
    name, _ = write_model(tmp_path)
    benchmark.main(["--model", name, *AT, "--keep-rate", "0.5", "--batch-size", "2", "--repeats", "3"])
    said = capsys.readouterr()
    assert json.loads(said.out)["model"] == stable_name(name) and "weights are random" in said.err
