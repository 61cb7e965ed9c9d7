"""Benchmarks of towers that have no text tower: what each library itself runs, and what is counted."""

import json

import pytest
import timm
import torch
from helpers import toy_hosts, toy_hub
from helpers.macs import counted
from timm.models.vision_transformer import VisionTransformer

from patchrank.benchmark import main
from patchrank.benchmark.golden_speed import from_pixels, kept_without, window_macs
from patchrank.benchmark.methods import create_methods, timm_twin
from patchrank.benchmark.mode import Mode
from patchrank.benchmark.schedules import Asked
from patchrank.benchmark.twin import measure
from patchrank.golden.scores import score_images
from patchrank.layers.pruning import windows
from patchrank.models.clip import create_clip
from patchrank.models.hosts.tower import SharedTower
from patchrank.utils.errors import UserError

ASKED = Asked(keep_rates=(0.5,), locations=(2,))


def of_timm(name):
    model = toy_hosts.create(name)
    model.reset_classifier(0)
    tower = SharedTower.around(model)
    tower.pretrained_cfg = {**tower.pretrained_cfg, "input_size": (3, toy_hosts.SIDE, toy_hosts.SIDE)}
    return tower


@pytest.mark.parametrize("name", ["SiglipVisionModel", "Dinov2Model", "CLIPModel", "ViTForImageClassification"])
@torch.inference_mode()
def test_the_first_line_of_a_tower_of_transformers_is_its_own_forward(name, tmp_path):
    pytest.importorskip("transformers")
    base = create_clip(toy_hub.write(toy_hub.create_any(name), tmp_path / "toy")).visual
    first, pruned = create_methods(["timm", "center"], base, "hf:toy", ASKED, Mode())
    x = toy_hosts.images()
    assert first.name == "transformers" and pruned.macs < first.macs == base.macs_unpruned().image
    assert not any(type(part).__module__.startswith("patchrank.") for part in first.tower.core.modules())
    torch.testing.assert_close(first.tower(x), base(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entry", ["patchrank_siglip_b16_224", "patchrank_dinov2_s14_reg4", "patchrank_vit_b16"])
@torch.inference_mode()
def test_timms_own_class_around_the_layers_of_an_entry(entry):
    base = timm.create_model(entry, **toy_hosts.TIMM, locations=(2,)).eval()
    twin, x = timm_twin(base), toy_hosts.images()
    assert type(twin) is VisionTransformer and twin.blocks is base.blocks
    assert torch.equal(twin(x), base(x))


@pytest.mark.parametrize("name", ["timm siglip", "timm average", "timm dinov2"])
@torch.inference_mode()
def test_a_window_is_scored_as_from_its_pixels(name):
    tower, x = of_timm(name), toy_hosts.images(1)
    squares = windows(tower.patch_embed.grid_size, 2)
    damage = score_images(tower, x, window=2, remove_at=2).windows[0, 0]
    pieces = from_pixels(tower, x.expand(len(squares), -1, -1, -1), kept_without(squares, tower), 2)
    lost = 1 - torch.cosine_similarity(pieces.double(), tower(x).double())
    torch.testing.assert_close(damage, lost, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["timm siglip", "timm average"])
def test_where_patches_are_read_the_last_block_is_counted_in_full(name):
    tower, count = of_timm(name).requires_grad_(False), 9
    length = tower.num_prefix_tokens + tower.num_patches - 4
    x = torch.randn(1, length, tower.embed_dim)
    own = counted(lambda: tower.forward_head(tower.norm(tower.blocks[1:](x))))
    shared = 3 * tower.embed_dim**2 * length  # queries, keys and values of the first layer, once an image
    whole = counted(lambda: tower(toy_hosts.images(1))) / count
    assert window_macs(tower, count, length, 2) == pytest.approx(own - shared + whole, rel=0.005)


def test_one_tower_beside_itself():
    tower = of_timm("timm siglip")
    tower.set_pruning(keep_rate=0.5, locations=(2,), reducer="center")
    assert measure(tower, batch_size=2, repeats=3)["ms"] > 0 and tower.pruner is not None


def test_commands_take_a_folder(tmp_path, capsys):
    pytest.importorskip("transformers")
    model = toy_hub.write(toy_hub.create_any("SiglipVisionModel"), tmp_path / "toy")
    common = ["--model", model, "--repeats", "3", "--batch-size", "2"]
    main([*common, "--keep-rate", "0.5", "--locations", "2", "--reducer", "center"])
    row = json.loads(capsys.readouterr().out)
    assert row["model"].startswith("hf:toy@") and row["gmacs"] < row["gmacs_unpruned"]
    main([*common, "--methods", "predictor", "--locations", "2", "--keep-rates", "0.5"])
    first, second = json.loads(capsys.readouterr().out)
    assert (first["method"], second["method"]) == ("transformers", "predictor")
    with pytest.raises(UserError, match="method 'open_clip': open_clip has no tower like hf:"):
        main([*common, "--methods", "open_clip", "--locations", "2"])
