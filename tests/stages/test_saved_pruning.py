"""Commands on a folder with a tower that was saved pruned: as it was saved, or as flags say."""

import json

import pytest
import timm
import torch
from PIL import Image

from patchrank import evaluate, repair
from patchrank.benchmark import command as benchmark
from patchrank.models.checkpoints.save import save_pretrained
from patchrank.models.clip import create_tower

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=4, init_values=0.5)
MERGED = dict(locations=(2, 3), drop_counts=(5, 4), reducer="attention_merge")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for n in range(100):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{n}.png")
    return ["--data", "folder", "--data-root", str(folder)]


@pytest.fixture
def saved(tmp_path):
    def save(depth=12, **pruning):
        torch.manual_seed(0)
        tower = timm.create_model("patchrank_dinov2_s14", **SMALL, depth=depth, **pruning).eval()
        with torch.no_grad():
            for weight in tower.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        save_pretrained(tower, tmp_path / "saved")
        return ["--model", f"local-dir:{tmp_path}/saved"]

    return save


@pytest.mark.parametrize(
    "pruning, flags, counts, title",
    [
        (MERGED, [], (5, 4), "5, 4 patches merged by attention_merge at layers 2, 3"),
        (
            dict(locations=(2,), keep_rate=0.25, reducer="center"),
            [],
            (12,),
            "25 % of patches kept by center",
        ),
        (MERGED, ["--keep-rate", "0.5"], (2, 2, 2, 2), "50 % of patches kept by attention_merge at layers 4, 6, 8, 10"),
        (MERGED, ["--drop-counts", "3", "--locations", "5"], (3,), "3 patches merged by attention_merge at layer 5"),
        (MERGED, ["--reducer", "random"], (5, 4), "5, 4 patches dropped by random at layers 2, 3"),
        (MERGED, ["--budget", "1"], (), "nothing pruned"),
        (
            dict(locations=(4,), drop_counts=(3,), reducer="predictor", predictor_init="random"),
            ["--keep-rate", "0.5"],
            (2, 2, 2, 2),
            "50 % of patches kept by predictor at layers 4, 6, 8, 10",
        ),
    ],
)
def test_what_is_saved_runs_unless_flags_say_another(saved, photos, monkeypatch, capsys, pruning, flags, counts, title):
    seen, real = [], evaluate.pair_and_split
    monkeypatch.setattr(evaluate, "pair_and_split", lambda args: seen.append(real(args)) or seen[0])
    evaluate.main([*saved(**pruning), *photos, *flags])
    out, told = capsys.readouterr()
    row, tower = json.loads(out), seen[0][0].visual
    assert tower.drop_counts == counts
    assert row["gmacs"] == tower.macs().image / 1e9 and (row["gmacs"] < row["gmacs_unpruned"]) == bool(counts)
    assert tuple(row["locations"]) == tower.pruning.locations and row["reducer"] == tower.pruning.reducer
    assert title in " ".join(told.split())


def test_other_stages_run_what_is_saved_too(saved, photos, tmp_path, capsys):
    name = saved(depth=4, locations=(3,), drop_counts=(6,), reducer="predictor", predictor_init="random")
    assert create_tower(name[1]).drop_counts == ()  # with random weights nothing could rank
    repair.main([*name, *photos, "--images", "50", "--out", str(tmp_path / "repair.safetensors")])
    row = json.loads(capsys.readouterr().out)
    assert row["drop_counts"] == [6] and row["locations"] == [3] and row["gmacs"] < row["gmacs_unpruned"]
    evaluate.main([*name, *photos, "--repair", str(tmp_path / "repair.safetensors")])
    assert "6 patches dropped by predictor at layer 3; repaired" in " ".join(capsys.readouterr().err.split())
    benchmark.main([*name, "--batch-size", "2", "--repeats", "3"])
    row = json.loads(capsys.readouterr().out)
    assert row["drop_counts"] == [6] and row["gmacs"] < row["gmacs_unpruned"]
