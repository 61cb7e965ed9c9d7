"""The counter against torch's own, with attention in its plain form so that nothing hides."""

import pytest
import timm
import torch
from helpers.macs import counted

from patchrank.layers.macs import text_macs, vision_macs
from patchrank.layers.reducers import REDUCERS
from patchrank.models.clip import macs_row


@pytest.mark.parametrize(
    "settings", [{}, {"cls_only_last": True}, {"keep_rate": 0.6}, {"keep_rate": 0.3, "locations": (1, 2)}]
)
@pytest.mark.parametrize("plain_attention", [False, True])
def test_vision_and_predictor(tower, images, settings, plain_attention):
    for block in tower.blocks:
        block.attn.fused_attn = not plain_attention
    tower.set_pruning(predictor_init="random", **settings)
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image


@pytest.mark.parametrize("reducer", sorted(set(REDUCERS) - {"golden"}))
@pytest.mark.parametrize("locations", [(4, 6, 8, 10), (4,), (1,), (1, 2, 12)])
def test_ranking_by_every_reducer(tower, images, reducer, locations):
    locations = tuple(max(layer, REDUCERS[reducer].first_location) for layer in locations)
    locations = tuple(dict.fromkeys(locations))  # some cannot rank before layer 1 has run
    tower.set_pruning(keep_rate=0.5, reducer=reducer, locations=locations, predictor_init="random")
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image


def test_class_attention_costs_one_query_against_the_tokens_that_are_there(tower):
    tower.set_pruning(drop_counts=(20, 20, 4), locations=(4, 6, 8), reducer="cls_attention")
    assert tower.macs().predictor == (65 + 45 + 25) * 64
    tower.set_pruning(drop_counts=(20,), locations=(1,))
    assert tower.macs().predictor == 65 * 64 + 64 * 64 + 65 * 64 * 64  # the row, its query and its keys
    for reducer in ("center", "random"):
        tower.set_pruning(reducer=reducer)
        assert tower.macs().predictor == 0


def test_text(clip):
    tokens = clip.tokenize(["a photo of a zero"])
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert counted(lambda: clip.text(tokens)) == text_macs(64, 3, 64)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_clip_b16_has_its_known_cost():
    with torch.device("meta"):
        model = timm.create_model("patchrank_clip_b16")
    assert vision_macs(model) / 1e9 == pytest.approx(17.5635, abs=1e-4)
    counts = (20, 20, 20, 20)
    assert vision_macs(model, (4, 6, 8, 10), counts) / 1e9 == pytest.approx(13.9223, abs=1e-4)
    assert vision_macs(model, (4, 6, 8, 10), counts, cls_only_last=True) / 1e9 == pytest.approx(13.22, abs=5e-3)
    assert text_macs(512, 12, 512) / 1e9 == pytest.approx(2.9798, abs=1e-4)


def test_pruning_saves_what_the_row_says(clip):
    clip.visual.set_pruning(keep_rate=0.6)
    row = macs_row(clip)
    assert row["gmacs_predictor"] < 0.02 * row["gmacs_unpruned"]
    assert row["gmacs"] < 0.8 * row["gmacs_unpruned"]
