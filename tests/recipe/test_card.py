"""What a card says beside its figures: how to load, whose images it shows, and what is worse than hoped for."""

import pytest

from patchrank.config import PruningConfig, TrialConfig
from patchrank.recipe.card import remark, write_card

CHOICE = TrialConfig(pruning=PruningConfig(reducer="rank_merge", locations=(3, 4), drop_counts=(6, 0)))
FIGURES = {"n_images": 30, "drift": 0.0012, "drift_p95": 0.004, "gmacs": 0.6, "gmacs_unpruned": 1.0}
FIGURES |= {"n_kept": 10, "n_tokens": 16, "ms": 2.0, "ms_unpruned": 3.0, "speedup": 1.5, "batch_size": 8}
FIGURES |= {"hardware": {"gpu": None, "cpu": "Some CPU", "threads": 1}, "agreement": 97.5}


def about(model="patchrank_clip_b16", figures=FIGURES, **changes):
    said = {"model": {"name": "its_name", "sha256": "0"}, "budget": "60 % of the MACs", "command": "python -m ..."}
    said |= {"date": "2026-11-28", "versions": {"patchrank": "0.1.0", "torch": "2"}, "figures": figures, "credit": ""}
    said |= {"given": {"model": model, "checkpoint": None}, "within_budget": True, "entry": False, "repair": None}
    said |= {"predictor": "predictor.safetensors", "img_size": [224, 224], "pruning": CHOICE.pruning.model_dump()}
    return said | {"images": {"train": 60, "val": 20, "test": 30}} | changes


def card(**changes):
    return write_card(about(**changes), {CHOICE: 0.001}, CHOICE, merged=True)


def test_figures_and_words():
    text = card()
    for words in (
        "# its\\_name, pruned to 60 % of the MACs",
        "| drift, 1000 (1 - cosine) to the unpruned embedding | 1.2 |",
        "| milliseconds of an image here | 2.00, unpruned 3.00: 1.50 times as fast |",
        "| answers that stay the same | 97.50 % |",
        "on Some CPU, 1 thread, torch 2.",
        "of 16 patches leave 6 at layer 3.",
        "Its predictor was fitted to golden scores of 60 images.",
        "on 20 other images",
    ):
        assert words in text
    assert "repair" not in text.replace("repaired", "")


@pytest.mark.parametrize(
    "model, line",
    [
        ("timm:vit_base_patch16_224", "model = timm.create_model('vit_base_patch16_224', pretrained=True)"),
        ("hf:google/siglip", "model = transformers.AutoModel.from_pretrained('google/siglip')"),
        ("open_clip:config.json", 'model = open_clip.create_model("local-dir:FOLDER")  # not pruned yet'),
    ],
)
def test_the_code_makes_a_model_of_its_kind(model, line):
    assert f"{line}\npatchrank.prune(model, " in card(model=model)


def test_an_entry_is_made_by_timm_with_its_repair():
    text = card(entry=True, repair="repair.safetensors")
    assert 'timm.create_model("local-dir:FOLDER", pretrained=True, repair_path="FOLDER/repair.safetensors")' in text
    assert "Its repair was solved on 60 images." in text


def test_whose_images_and_weights_they_are():
    text = card(credit="Photographs: somebody.", given={"model": "patchrank_clip_b16", "checkpoint": "my_clip.pt"})
    assert text.endswith("\n\nPhotographs: somebody.\n") and "The weights are those of my\\_clip.pt." in text


def test_what_is_worse_than_hoped_for_is_said():
    assert remark(about()) == ""
    assert "slower than unpruned here" in remark(about(figures=FIGURES | {"speedup": 0.9}))
    assert "over the budget of 60 % of the MACs" in remark(about(within_budget=False))
    assert "over the budget" in card(within_budget=False)
