"""Entries that are not CLIP's are timm's own towers while nothing is pruned."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import list_models

from patchrank.models.patchrank_vit import THEIRS
from patchrank.utils.errors import UserError

SMALL = dict(img_size=28, patch_size=14, embed_dim=32, depth=3, num_heads=4, locations=(2,))
THEIR_SMALL = {name: value for name, value in SMALL.items() if name != "locations"}


def both(ours, **settings):
    """timm's tower and ours with the same weights."""
    torch.manual_seed(0)
    theirs = timm.create_model(THEIRS[ours], **settings).eval()
    for weight in theirs.parameters():
        weight.data.add_(0.02 * torch.randn_like(weight))
    tower = timm.create_model(ours, **settings, locations=(2,)).eval()
    tower.load_state_dict(theirs.state_dict())
    return theirs, tower


@pytest.mark.parametrize("ours", THEIRS)
@torch.no_grad()
def test_an_entry_is_timms_bit_for_bit(ours):
    theirs, tower = both(ours, **THEIR_SMALL)
    x = torch.randn(2, 3, 28, 28)
    assert torch.equal(tower(x), theirs(x))
    assert torch.equal(tower.forward_features(x), theirs.forward_features(x))
    tower.set_pruning(keep_rate=0.5, reducer="center", locations=(2,))
    assert tower(x).shape == theirs(x).shape and not torch.allclose(tower(x), theirs(x), atol=1e-5)


ONE_OF_EACH = ("patchrank_siglip_b16_224", "patchrank_dinov2_s14_reg4", "patchrank_deit_s16")


@pytest.mark.parametrize(
    "ours", [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.slow) for name in THEIRS]
)
def test_an_entry_has_timms_shape_tags_and_transform(ours):
    theirs, tower = (timm.create_model(name, device="meta") for name in (THEIRS[ours], ours))
    assert {key: value.shape for key, value in tower.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert resolve_data_config(model=tower) == resolve_data_config(model=theirs)
    assert tower.pretrained_cfg["hf_hub_id"] == theirs.pretrained_cfg["hf_hub_id"]
    names = [list_models(f"{entry}.*", pretrained=True) for entry in (ours, THEIRS[ours])]
    tags = [{name.partition(".")[2] for name in found} for found in names]
    assert tags[0] == tags[1]


@pytest.mark.slow
@pytest.mark.parametrize("ours", [name for name in THEIRS if "so400m" not in name and "_l14" not in name])
@torch.no_grad()
def test_so_it_is_at_full_size(ours):
    settings = {"img_size": 224} if "dinov2" in ours else {}
    theirs, tower = both(ours, **settings)
    x = torch.randn(1, 3, *theirs.patch_embed.img_size)
    assert torch.equal(tower(x), theirs(x))


@torch.no_grad()
def test_weights_come_from_a_file(tmp_path):
    theirs, _ = both("patchrank_siglip_b16_224", **THEIR_SMALL)
    path = str(tmp_path / "siglip.safetensors")
    save_file(theirs.state_dict(), path)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}
    tower = timm.create_model("patchrank_siglip_b16_224", keep_rate=0.5, reducer="center", **SMALL, **overlay).eval()
    x = torch.randn(2, 3, 28, 28)
    assert torch.equal(tower.forward_whole(x), theirs(x))
    wrong = {**theirs.state_dict(), "norm.weight": torch.ones(7)}
    save_file(wrong, path)
    with pytest.raises(UserError, match="siglip.safetensors: norm.weight has shape .7,., not .32,."):
        timm.create_model("patchrank_siglip_b16_224", **SMALL, **overlay)


def test_weights_that_no_hub_gives_are_told_of(monkeypatch):
    with pytest.raises(UserError, match="timm/vit_small_patch14_dinov2.lvd142m are not in the cache"):
        timm.create_model("patchrank_dinov2_s14", pretrained=True, keep_rate=0.5, reducer="center")


def test_registers_leave_with_nobody():
    tower = timm.create_model("patchrank_dinov2_s14_reg4", **SMALL, keep_rate=0.5, reducer="center").eval()
    assert tower.num_prefix_tokens == 5 and tower.forward_features(torch.randn(1, 3, 28, 28)).shape == (1, 9, 32)
