"""Towers in other precisions, trained on or quantised, and settings in NumPy's and torch's numbers."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

import patchrank
from patchrank.benchmark import measure
from patchrank.config import GoldenConfig, TrialConfig
from patchrank.fit import fit_predictor
from patchrank.golden.dataset import Ranked
from patchrank.golden.scores import score_images
from patchrank.layers.predictors import create_predictor, load_predictor, save_predictor
from patchrank.layers.prompts import Prompts
from patchrank.layers.schedule import check_locations, drop_schedule
from patchrank.models.pretrained import WEIGHTS
from patchrank.models.prompt_files import describe, load_prompts, save_prompts
from patchrank.utils.errors import UserError

DIGITS = "patchrank_clip_digits"
PREDICTOR = WEIGHTS / f"{DIGITS}.predictor.safetensors"
ALL = [torch.bfloat16, torch.float16, torch.float64]
COUNTS = (7, 7, 6, 6)  # of keep_rate 0.6


def digits(**settings):
    return timm.create_model(DIGITS, pretrained=True, **settings).eval()


@torch.no_grad()
def trained(tower, layer=0):
    tower.blocks[layer].mlp.fc1.weight.mul_(1.1)
    return tower


# Precision


WAYS = {
    "unpruned": lambda dtype: digits().to(dtype),
    "pruned": lambda dtype: digits(keep_rate=0.8).to(dtype),
    "made in it": lambda dtype: digits(dtype=dtype),
    "made in it and pruned": lambda dtype: digits(dtype=dtype, keep_rate=0.8),
    "part of a pair": lambda dtype: patchrank.create_clip(DIGITS).to(dtype).visual,
    "rounded twice": lambda dtype: digits().half().to(dtype),
    "back in float32": lambda dtype: digits().to(dtype).float(),
    "copied": lambda dtype: copy.deepcopy(digits().to(dtype)),
    "pickled": lambda dtype: pickle.loads(pickle.dumps(digits().to(dtype))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_tower_in_another_precision_prunes_by_its_own_predictor(way, dtype):
    tower = WAYS[way](dtype)
    tower.set_pruning(keep_rate=0.6)
    tower.set_pruning(keep_rate=0.5)
    tower.set_pruning(predictor_path=PREDICTOR, keep_rate=0.6)
    weight = tower.pos_embed
    assert tower.drop_counts == COUNTS and {each.dtype for each in tower.parameters()} == {weight.dtype}
    assert tower(torch.zeros(1, 3, 64, 64, dtype=weight.dtype)).isfinite().all()


def test_weights_that_are_loaded_into_half_precision_are_known_too():
    tower, weights = digits(dtype=torch.bfloat16), digits().state_dict()
    tower.set_pruning(keep_rate=0.6)
    tower.load_state_dict(weights | {k: v for k, v in tower.state_dict().items() if k.startswith("pruner.")})
    tower.set_pruning(keep_rate=0.5)
    tower.set_pruning(keep_rate=1.0)
    tower.load_state_dict({key: 1.5 * value for key, value in weights.items()})
    with pytest.raises(UserError, match="was fitted to .* in bfloat16; try the same before they are rounded"):
        tower.set_pruning(keep_rate=0.5)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("early", [True, False])
def test_weights_that_changed_before_or_after_are_refused_in_any_precision(dtype, early):
    tower = trained(digits(keep_rate=0.8)).to(dtype) if early else trained(digits(keep_rate=0.8).to(dtype))
    before = tower.pruning, tower.drop_counts
    with pytest.raises(UserError, match="was fitted to .* but this tower's weights are"):
        tower.set_pruning(keep_rate=0.6)
    assert (tower.pruning, tower.drop_counts) == before


def test_a_predictor_of_another_tower_is_refused_in_any_precision(tower, tmp_path):
    about = load_predictor(PREDICTOR)[1]
    about = about | {"model": {"name": "other", "sha256": tower.blocks_sha256()}}
    save_predictor(load_predictor(PREDICTOR)[0], tmp_path / "p.safetensors", about)
    for other in (digits(), digits().half(), digits(dtype=torch.bfloat16), digits().double()):
        with pytest.raises(UserError, match="was fitted to other with weights"):
            other.set_pruning(keep_rate=0.5, predictor_path=tmp_path / "p.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_prompts_follow_the_same_rule(dtype, tmp_path):
    pair, path = patchrank.create_clip(DIGITS), tmp_path / "prompts.safetensors"
    save_prompts(Prompts("TV", 2, 64, 64), path, describe(pair))
    pair.to(dtype).set_prompts(load_prompts(path)[0].to(dtype))
    assert pair.visual.num_prompt_tokens == 2 and len(pair.sha256()) == 64
    assert digits(dtype=dtype, prompts_path=path).num_prompt_tokens == 2
    other = patchrank.create_clip(DIGITS)
    trained(other.visual)
    with pytest.raises(UserError, match="tuned with patchrank_clip_digits with weights .*, but this model is"):
        other.to(dtype).set_prompts(load_prompts(path)[0])


def test_weights_as_they_came_are_fingerprinted_once(monkeypatch):
    from patchrank.models import fingerprints

    taken, real = [], fingerprints.weights_sha256
    monkeypatch.setattr(fingerprints, "weights_sha256", lambda *args: taken.append(args) or real(*args))
    tower = digits(keep_rate=0.6)
    assert len(taken) == 1
    tower.to("cpu").float().eval().share_memory()
    assert len(taken) == 1


def test_open_clips_mixed_precision_keeps_the_fingerprint_that_files_have_of_it(tmp_path):
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=64)
    model = open_clip.CLIP(16, vision, open_clip.CLIPTextCfg(layers=1, width=16, heads=1))
    open_clip.convert_weights_to_lp(model, torch.float16)
    trunk = patchrank.prune_open_clip(model, locations=(2,)).visual.trunk
    assert {weight.dtype for weight in trunk.parameters()} == {torch.float16, torch.float32}
    predictor, about = load_predictor(PREDICTOR)
    fitted_to = {"name": "mixed", "sha256": trunk.blocks_sha256()}
    save_predictor(predictor, tmp_path / "p.safetensors", about | {"location": 2, "model": fitted_to})
    trunk.set_pruning(keep_rate=0.5, predictor_path=tmp_path / "p.safetensors")
    trained(trunk)
    with pytest.raises(UserError, match="in float16; try the same before they are rounded to it; if it shall rank"):
        trunk.set_pruning(keep_rate=0.6)


def test_prompts_that_were_taken_out_again_are_compared_with_nothing(tower, tmp_path):
    save_prompts(Prompts("V", 2, 64, 64), tmp_path / "p.safetensors", describe(patchrank.create_clip(DIGITS)))
    other = timm.create_model(DIGITS, prompts_path=tmp_path / "p.safetensors")
    with pytest.raises(UserError, match="tuned with patchrank_clip_digits, whose image tower"):
        other.load_state_dict(tower.state_dict())
    other.set_prompts(None)
    other.load_state_dict(tower.state_dict())
    assert torch.equal(other.pos_embed, tower.pos_embed)


# Training


def test_a_keep_rate_is_annealed_while_the_tower_learns(images):
    """What the refusal says to call works for the rest of the loop, at keep rate 1 too, and in other precisions."""
    tower, targets = digits(keep_rate=0.9).train(), torch.randn(4, 64)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.01)

    def learn():
        optimizer.zero_grad()
        nn.functional.mse_loss(tower(images), targets).backward()
        optimizer.step()

    learn()
    with pytest.raises(UserError, match=r"if it shall rank all the same, try set_pruning\(predictor=model.predictor, "):
        tower.set_pruning(keep_rate=0.8)
    mine = tower.predictor
    tower.set_pruning(predictor=tower.predictor, keep_rate=0.8)
    for keep_rate in (1.0, 0.7, np.float32(0.6), 1.0, 0.5):
        learn()
        tower.set_pruning(keep_rate=keep_rate)
        assert tower.predictor is mine and (tower.pruner is None or tower.pruner.reducer.predictor is mine)
    tower.half().set_pruning(keep_rate=0.6)
    assert tower.drop_counts == COUNTS and mine.narrow.weight.dtype is torch.float16


def test_a_tower_that_was_trained_unpruned_is_told_how_to_take_the_predictor_from_its_file():
    tower = trained(digits())
    with pytest.raises(UserError) as refused:
        tower.set_pruning(keep_rate=0.6)
    assert str(refused.value).endswith(f"predictors.load_predictor({str(PREDICTOR)!r})[0], ...)")
    tower.set_pruning(predictor=load_predictor(str(PREDICTOR))[0], keep_rate=0.6)
    trained(tower).set_pruning(keep_rate=0.6)
    assert tower.drop_counts == COUNTS


# Quantised towers, and errors of any kind


def quantised(tower):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has moved quantisation elsewhere, where it is not installed
        return torch.ao.quantization.quantize_dynamic(tower, {nn.Linear})


class Packed(torch.Tensor):
    """Stands for the tensor classes of torchao and its like."""


def packed(tower):
    weight = tower.blocks[0].mlp.fc1.weight
    tower.blocks[0].mlp.fc1.weight = nn.Parameter(weight.detach().as_subclass(Packed), requires_grad=False)
    return tower


@torch.no_grad()
@pytest.mark.parametrize("change", [quantised, packed])
def test_a_quantised_tower_goes_on_pruning_but_takes_no_file_on_trust(change, images):
    tower = change(digits(keep_rate=0.8))
    tower.set_pruning(keep_rate=0.6)
    expected = digits(keep_rate=0.6)(images)
    assert tower.drop_counts == COUNTS and torch.cosine_similarity(tower(images), expected).min() > 0.99
    late = change(digits())
    before = late.pruning
    with pytest.raises(UserError, match="are quantised, .* prune the tower before that, or try set_pruning"):
        late.set_pruning(keep_rate=0.6)
    assert late.pruning == before and late.pruner is None
    late.set_pruning(predictor=load_predictor(PREDICTOR)[0], keep_rate=0.6)
    assert torch.cosine_similarity(late(images), expected).min() > 0.99
    late.set_pruning(keep_rate=0.5, reducer="center")
    with pytest.raises(UserError, match="is quantised, or otherwise no plain tensor"):
        late.blocks_sha256()


class Raising(nn.Module):
    """Raises as soon as it is to be moved to the tower's device and precision."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def _apply(self, *args):
        raise self.error

    def forward(self, cls, patches):
        return patches.sum(-1)


@pytest.mark.parametrize("start", [{}, {"keep_rate": 0.8}])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, UserError])
def test_nothing_changes_whatever_goes_wrong(start, error, monkeypatch):
    tower, wrong = digits(**start), Raising(error)
    before = tower.pruning, tower.pruner, tower.predictor, timm.models.get_model_args(tower)
    with pytest.raises(error):
        tower.set_pruning(predictor=wrong, keep_rate=0.6, locations=(2, 3))
    assert (tower.pruning, tower.pruner, tower.predictor, timm.models.get_model_args(tower)) == before
    with monkeypatch.context() as patched:  # the predictor is in its place by then
        patched.setattr(tower, "known_as", lambda weights: Raising(error).cpu())
        with pytest.raises(error):
            tower.set_pruning(predictor_path=PREDICTOR, keep_rate=0.6)
    assert (tower.pruning, tower.pruner, tower.predictor, timm.models.get_model_args(tower)) == before
    tower.set_pruning(keep_rate=0.6)
    assert tower.drop_counts == COUNTS


# Numbers


def is_plain(value):
    return all(map(is_plain, value)) if isinstance(value, (tuple, list)) else type(value) in (int, float, bool, str)


RATES = [np.float32(0.6), np.float16(0.6), np.float64(0.6), np.array(0.6), np.array(0.6, np.float32), torch.tensor(0.6)]
LAYERS = [np.array([4, 8]), torch.tensor([4, 8]), [np.int64(4), np.uint8(8)], (torch.tensor(4), np.array(8))]


@pytest.mark.parametrize("keep_rate", RATES, ids=repr)
def test_a_keep_rate_of_another_library_is_the_number_that_it_prints_as(keep_rate, tmp_path):
    tower = digits(keep_rate=keep_rate)
    args = timm.models.get_model_args(tower)
    assert tower.pruning.keep_rate == 0.6 == args["keep_rate"] and type(tower.pruning.keep_rate) is float
    assert type(args["keep_rate"]) is float
    tower.set_pruning(keep_rate=1.0)
    tower.set_pruning(keep_rate=keep_rate)
    assert type(timm.models.get_model_args(tower)["keep_rate"]) is float and tower.drop_counts == COUNTS
    patchrank.save_pretrained(tower, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["model_args"]
    assert saved["keep_rate"] == 0.6
    timm.models.save_for_hf(tower, tmp_path / "timms")  # which refuses what JSON does not know


@pytest.mark.parametrize("layers", LAYERS, ids=repr)
def test_locations_counts_and_seeds_of_other_libraries(layers):
    tower = digits(keep_rate=0.5, reducer="random", locations=layers, seed=np.int64(3), img_size=np.int64(64))
    assert tower.pruning.locations == (4, 8) and is_plain(tower.pruning.locations) and tower.pruning.seed == 3
    args = timm.models.get_model_args(tower)
    assert is_plain([value for key, value in args.items() if key not in ("act_layer", "predictor_path")])
    tower.set_pruning(drop_counts=layers, seed=torch.tensor(7))
    assert tower.drop_counts == (4, 8) and is_plain([*tower.pruning.drop_counts, tower.pruning.seed])
    pair = patchrank.create_clip(DIGITS, keep_rate=np.float32(0.6), locations=layers, reducer="center")
    assert pair.visual.pruning.keep_rate == 0.6 and is_plain(pair.visual.pruning.locations)


def test_numbers_of_other_libraries_in_open_clip_models_and_in_schemas():
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=4, width=32, head_width=16, patch_size=16, image_size=32)
    model = open_clip.CLIP(16, vision, open_clip.CLIPTextCfg(layers=1, width=16, heads=1))
    settings = {"keep_rate": np.float32(0.5), "locations": np.array([2, 3]), "reducer": "random", "seed": np.int64(1)}
    pruning = patchrank.prune_open_clip(model, **settings).visual.trunk.pruning
    assert (pruning.keep_rate, pruning.locations) == (0.5, (2, 3)) and is_plain([pruning.seed, *pruning.locations])
    trial = TrialConfig(pruning={"keep_rate": np.float32(0.6), "locations": np.array([4])}, seed=np.int64(2))
    assert trial == TrialConfig(pruning={"keep_rate": 0.6, "locations": (4,)}, seed=2)
    assert trial.model_dump_json() and GoldenConfig(window=np.array(3)).window == 3


@pytest.mark.parametrize("whole", [np.int64, np.array, torch.tensor], ids=["numpy", "array", "torch"])
def test_numbers_of_other_libraries_in_scoring_fitting_and_timing(whole, images):
    tower = digits(keep_rate=0.6)
    numbers = {"window": 4, "stride": 4, "remove_at": 12}
    other = {key: whole(value) for key, value in numbers.items()}
    scored = [score_images(tower, images[:1], batch_size=8, **each).scores for each in (numbers, other)]
    assert torch.equal(*scored)
    data = Ranked(torch.randn(8, 16), torch.randn(8, 4, 16), torch.randn(8, 4))
    how = {"epochs": whole(2), "lr": np.float32(0.01), "seed": whole(1), "dim": whole(4), "quiet": True}
    fitted = fit_predictor(data, (whole(2), whole(2)), **how)
    expected = fit_predictor(data, (2, 2), epochs=2, lr=0.01, seed=1, dim=4, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(fitted.state_dict().values(), expected.state_dict().values()))
    assert fitted.settings == expected.settings and is_plain(list(fitted.settings.values()))
    assert measure(tower, batch_size=whole(1), repeats=whole(3), seed=whole(0))["ms"] > 0
    assert is_plain(check_locations([whole(4)], 12) + drop_schedule(whole(64), 0.5, (4, 6)))


@pytest.mark.parametrize("wrong", [float("nan"), np.float32("nan"), float("inf"), True, np.True_, "0.6", None, 0, 1.01])
def test_what_is_no_share_is_told_in_one_plain_line(wrong, tower):
    with pytest.raises(UserError) as refused:
        tower.set_pruning(keep_rate=wrong)
    assert str(refused.value) == f"pruning: keep_rate is {wrong!r}, but should be a number above 0 and at most 1"
    assert tower.pruning.keep_rate == 1.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"locations": np.array([4.0, 8.0])}, "locations.0 is np.float64(4.0), but should be a valid integer"),
        ({"locations": np.array([[4]])}, "should be a valid integer"),
        ({"locations": np.int64(4)}, "locations is np.int64(4), but should be a valid list"),
        ({"locations": {4, 8}}, "should be a list, whose items have an order; try [a, b]"),
        ({"locations": frozenset({4})}, "should be a list, whose items have an order; try [a, b]"),
        ({"drop_counts": {3}}, "should be a list, whose items have an order; try [a, b]"),
        ({"seed": np.float64(3)}, "seed is np.float64(3.0), but should be a valid integer"),
        ({"seed": np.True_}, "seed is np.True_, but should be a valid integer"),
    ],
)
def test_other_kinds_of_numbers_and_of_collections_are_refused(settings, message, tower):
    with pytest.raises(UserError) as refused:
        tower.set_pruning(keep_rate=0.5, **settings)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_predictor_in_use_is_at_hand():
    tower = digits()
    assert tower.predictor is None
    mine = create_predictor("mlp", 64, (8, 8))
    tower.set_pruning(predictor=mine)  # nothing leaves yet
    assert tower.predictor is mine and tower.pruner is None
    tower.set_pruning(keep_rate=0.6)
    assert tower.pruner.reducer.predictor is mine
    tower.set_pruning(reducer="center")
    assert tower.predictor is None
