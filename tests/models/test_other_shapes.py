"""Other image sizes, formats of feature maps, and weights from timm's `checkpoint_path`."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import resolve_data_config, resolve_model_data_config
from timm.layers import Format

import patchrank
from patchrank import evaluate
from patchrank.benchmark import measure
from patchrank.config import BenchmarkConfig, ModelConfig, TrialConfig
from patchrank.config.canonical import canonical
from patchrank.data.dataset_factory import load_split
from patchrank.golden.make_shards import shard_folder
from patchrank.layers.prompts import Prompts
from patchrank.models.pretrained import WEIGHTS
from patchrank.models.prompt_files import describe, save_prompts
from patchrank.trial.check import check_trial, counted_gmacs
from patchrank.trial.identity import speed_id, trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.speed import random_tower
from patchrank.utils.errors import UserError

DIGITS = "patchrank_clip_digits"
PREDICTOR = WEIGHTS / f"{DIGITS}.predictor.safetensors"
TINY = {"depth": 2, "embed_dim": 16, "num_heads": 2, "locations": (1,)}


# Image sizes


@torch.no_grad()
@pytest.mark.parametrize("size, expected", [(96, (96, 96)), ((64, 96), (64, 96)), (np.array([96, 64]), (96, 64))])
def test_transforms_follow_the_size_of_the_tower(size, expected):
    pair = patchrank.create_clip(DIGITS, img_size=size)
    image = pair.transform()(Image.new("RGB", (100, 80)))
    assert image.shape[1:] == expected and pair.encode_image(image[None]).shape == (1, 64)
    assert pair.transform_settings()["input_size"] == [3, *expected]
    split = load_split("digits", "val", 2)
    assert shard_folder(pair, split, "shards").header["transform"]["input_size"] == [3, *expected]
    assert measure(pair, batch_size=1, repeats=3)["ms"] > 0
    with pytest.raises(
        UserError, match="this tower has .*; try a predictor that was fitted for it, or another reducer"
    ):
        pair.visual.set_pruning(keep_rate=0.5, predictor_path=PREDICTOR)
    pair.visual.set_pruning(keep_rate=0.5, reducer="cls_attention")
    assert pair.encode_image(image[None]).isfinite().all()


def test_at_the_usual_size_nothing_changes(clip):
    usual = {"crop_mode": "center", "crop_pct": 1.0, "input_size": [3, 64, 64], "interpolation": "bicubic"}
    assert {key: clip.transform_settings()[key] for key in usual} == usual
    assert patchrank.create_clip(DIGITS, img_size=64).transform_settings() == clip.transform_settings()


def test_timms_own_transforms_follow_it_too(tmp_path):
    tower = timm.create_model(DIGITS, pretrained=True, img_size=96)
    features = timm.create_model(DIGITS, img_size=96, features_only=True)
    resized = timm.create_model(DIGITS, pretrained=True)
    resized.set_input_size((96, 96))
    for each in (tower, features, resized):
        assert resolve_data_config(model=each)["input_size"] == (3, 96, 96)
    assert torch.allclose(tower.pos_embed, resized.pos_embed, atol=1e-3)  # resampled from float16
    patchrank.save_pretrained(tower, tmp_path / "saved")
    for size, side in (({}, 96), ({"img_size": 64}, 64)):
        back = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, **size)
        assert resolve_model_data_config(back)["input_size"] == (3, side, side)
    resized.set_pruning(keep_rate=0.5, reducer="center")
    with pytest.raises(UserError, match="set_input_size would undo the grid"):
        resized.set_input_size((64, 64))


def test_open_clips_preprocessing_follows_it_too():
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=48)
    model = open_clip.CLIP(16, vision, open_clip.CLIPTextCfg(layers=1, width=16, heads=1))
    patchrank.prune_open_clip(model, keep_rate=0.5, reducer="center", locations=(2,))
    assert resolve_data_config(model=model.visual.trunk)["input_size"] == (3, 48, 48)


@pytest.mark.parametrize("size", [4, 0, -3, "96", 1.5, True, (64, 4), (1, 2, 3)])
def test_what_is_no_image_size_is_told_in_one_line(size):
    with pytest.raises(UserError, match="^img_size must be a side of at least 8 pixels .one patch., or .height, width"):
        timm.create_model(DIGITS, img_size=size)


def write_pair(path, **settings):
    """The checkpoint of a pair that somebody trained on images of another size."""
    pair = patchrank.create_clip(DIGITS)
    pair.visual = timm.create_model(DIGITS, **settings)
    save_file({key: value.contiguous() for key, value in pair.state_dict().items()}, path)
    return pair


def test_a_checkpoint_of_another_side_says_which(tmp_path, capsys):
    path = tmp_path / "pair.safetensors"
    pair = write_pair(path, img_size=96)
    said = r"grid 12 x 12, 64 outputs, but .* has .* grid 16 x 16, .*; img_size=96 \(--img-size 96\) would fit$"
    with pytest.raises(UserError, match=said):
        patchrank.create_clip(DIGITS, checkpoint=path, img_size=128)
    found = patchrank.create_clip(DIGITS, checkpoint=path, img_size=96)
    assert torch.equal(found.visual.pos_embed, pair.visual.pos_embed)
    flags = ["--split", "val", "--limit", "4", "--checkpoint", str(path)]
    evaluate.main([*flags, "--img-size", "96"])
    assert '"img_size": 96' in capsys.readouterr().out


def test_one_of_another_size_is_taken_at_that_size_and_one_of_the_entrys_own_is_resampled():
    large = timm.create_model("patchrank_clip_l14_336", **TINY)
    small = timm.create_model("patchrank_clip_l14", **TINY)
    with pytest.raises(UserError, match=r"; img_size=336 \(--img-size 336\) would fit$"):
        timm.create_model("patchrank_clip_l14", pretrained=True, **TINY, pretrained_cfg_overlay=state(large))
    found = timm.create_model(
        "patchrank_clip_l14", pretrained=True, **TINY, img_size=336, pretrained_cfg_overlay=state(large)
    )
    assert torch.equal(found.pos_embed, large.pos_embed)
    resampled = timm.create_model(
        "patchrank_clip_l14", pretrained=True, **TINY, img_size=336, pretrained_cfg_overlay=state(small)
    )
    assert resampled.pos_embed.shape == large.pos_embed.shape


def state(tower):
    return {"state_dict": tower.state_dict()}


def test_weights_of_the_entrys_own_size_are_resampled_after_the_tower_was_made_as_well(tmp_path):
    write_pair(tmp_path / "usual.safetensors", pretrained=True)
    found = patchrank.create_clip(DIGITS, checkpoint=tmp_path / "usual.safetensors", img_size=96)
    expected = timm.create_model(DIGITS, pretrained=True, img_size=96).pos_embed
    assert torch.allclose(found.visual.pos_embed, expected, atol=1e-3)  # resampled from float16


SMALL = {"data": {"n_train": 8, "n_val": 8, "n_test": 8}, "pruning": {"keep_rate": 0.5, "reducer": "center"}}


def test_a_sweep_may_set_the_size_which_enters_ids_only_then(clip):
    usual, larger = (TrialConfig(**SMALL, model=model) for model in ({}, {"img_size": 96}))
    assert "img_size" not in canonical(usual)["model"] and canonical(larger)["model"]["img_size"] == 96
    found = [load_inputs(config.model, config.data) for config in (usual, larger)]
    assert [inputs.clip.visual.num_patches for inputs in found] == [64, 144]
    trials = [ResolvedTrial(config) for config in (usual, larger)]
    assert trial_id(TrialContext(trials[0], found[0])) != trial_id(TrialContext(trials[1], found[1]))
    timed = [speed_id(trial, {}, BenchmarkConfig()) for trial in trials]
    assert timed[0] != timed[1] and [random_tower(trial).num_patches for trial in trials] == [64, 144]
    assert counted_gmacs(trials[1]) > 2 * counted_gmacs(trials[0])
    check_trial(trials[1])
    with pytest.raises(UserError, match="window must lie in 1..12 on a 12 x 12 grid, but is 13"):
        check_trial(ResolvedTrial(TrialConfig(**SMALL, model={"img_size": 96}, golden={"window": 13})))
    with pytest.raises(UserError, match="img_size must be a side of at least 8 pixels"):
        check_trial(ResolvedTrial(TrialConfig(**SMALL, model=ModelConfig(img_size=4))))


# Formats of feature maps


@pytest.mark.parametrize("settings", [{}, {"keep_rate": 0.6, "reducer": "center"}], ids=["unpruned", "pruned"])
def test_a_format_is_given_or_refused_alike_pruned_or_not(settings, images):
    tower = timm.create_model(DIGITS, **settings).eval()
    for fmt, shape in [("NCHW", (64, 8, 8)), ("NLC", (64, 64)), (Format.NLC, (64, 64)), (Format.NCHW, (64, 8, 8))]:
        (found,) = tower.forward_intermediates(images, indices=1, output_fmt=fmt, intermediates_only=True)
        assert found.shape == (4, *shape)
    for wrong in ("NHWC", Format.NHWC, "NCL", "nlc", "", None, 7):
        name = getattr(wrong, "value", wrong)
        with pytest.raises(UserError, match=f"^output_fmt must be one of NCHW, NLC, but is {name!r}; "):
            tower.forward_intermediates(images, output_fmt=wrong)


# timm's checkpoint_path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of the tower that ships and of another one, and prompts for the first."""
    folder = tmp_path_factory.mktemp("files")
    save_file(timm.create_model(DIGITS, pretrained=True).state_dict(), folder / "own.safetensors")
    save_file(timm.create_model(DIGITS).state_dict(), folder / "other.safetensors")
    save_prompts(Prompts("TV", 2, 64, 64), folder / "prompts.safetensors", describe(patchrank.create_clip(DIGITS)))
    return folder


def both_ways(file):
    return [{"checkpoint_path": str(file)}, {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}]


@torch.no_grad()
@pytest.mark.parametrize("way", [0, 1], ids=["checkpoint_path", "overlay"])
def test_weights_from_a_file_go_together_with_a_predictor_and_prompts(way, files, images):
    given = both_ways(files / "own.safetensors")[way]
    expected = timm.create_model(DIGITS, pretrained=True, keep_rate=0.6).eval()
    found = timm.create_model(DIGITS, predictor_path=PREDICTOR, keep_rate=0.6, **given).eval()
    assert torch.equal(found(images), expected(images))
    found.set_pruning(keep_rate=0.5)
    assert found.drop_counts == (8, 8, 8, 8)
    late = timm.create_model(DIGITS, predictor_path=PREDICTOR, keep_rate=1, **given).eval()
    late.set_pruning(keep_rate=0.6)
    assert torch.equal(late(images), expected(images))
    prompts = {"prompts_path": files / "prompts.safetensors"}
    assert timm.create_model(DIGITS, predictor_path=PREDICTOR, keep_rate=0.6, **prompts, **given).num_prompt_tokens == 2
    half = timm.create_model(DIGITS, predictor_path=PREDICTOR, keep_rate=0.6, dtype=torch.bfloat16, **prompts, **given)
    assert half.drop_counts == (7, 7, 6, 6)
    assert timm.create_model(DIGITS, reducer="center", keep_rate=0.6, **given).drop_counts == (7, 7, 6, 6)
    assert timm.create_model(DIGITS, predictor_init="random", keep_rate=0.6, **given).drop_counts == (7, 7, 6, 6)


@pytest.mark.parametrize("way", [0, 1], ids=["checkpoint_path", "overlay"])
def test_what_was_made_for_another_tower_than_the_files_is_refused(way, files):
    given = both_ways(files / "other.safetensors")[way]
    with pytest.raises(UserError, match="was fitted to patchrank_clip_digits with weights .*, but this tower's"):
        timm.create_model(DIGITS, predictor_path=PREDICTOR, keep_rate=0.6, **given)
    with pytest.raises(UserError, match="tuned with patchrank_clip_digits, whose image tower has weights"):
        timm.create_model(DIGITS, prompts_path=files / "prompts.safetensors", **given)


def test_another_head_needs_the_overlay(files):
    """timm's `checkpoint_path` wants every weight in its shape; the overlay leaves out a head of other classes."""
    how = {"predictor_path": PREDICTOR, "keep_rate": 0.6, "num_classes": 5}
    strict, adapted = both_ways(files / "own.safetensors")
    assert timm.create_model(DIGITS, **how, **adapted).drop_counts == (7, 7, 6, 6)
    with pytest.raises(RuntimeError, match="size mismatch for head.weight"):
        timm.create_model(DIGITS, **how, **strict)


def test_weights_that_bring_a_predictor_are_taken_with_it(files):
    trained = timm.create_model(DIGITS, pretrained=True, keep_rate=0.6)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(1.01)
    resumed = timm.create_model(DIGITS, predictor_path=PREDICTOR, keep_rate=0.6)
    resumed.load_state_dict(trained.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), trained.state_dict().values()))
    unpruned = {key: value for key, value in trained.state_dict().items() if not key.startswith("pruner.")}
    before = {key: value.clone() for key, value in resumed.state_dict().items()}
    with pytest.raises(UserError, match="was fitted to"):
        resumed.load_state_dict(unpruned)
    assert all(torch.equal(before[key], value) for key, value in resumed.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key.*norm.bias"):
        resumed.load_state_dict({key: value for key, value in unpruned.items() if key != "norm.bias"})
