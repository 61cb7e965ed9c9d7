"""A tower in a local directory and back: weights, predictor and settings, or nothing."""

import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from patchrank.layers.predictors import PREDICTORS, Prior, create_predictor, register_predictor
from patchrank.layers.reducers import REDUCERS
from patchrank.models.checkpoints.load import load_tower
from patchrank.models.checkpoints.save import save_pretrained
from patchrank.models.pretrained import WEIGHTS
from patchrank.utils.errors import UserError

DIGITS = "patchrank_clip_digits"
SCORES = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))


def load(directory, **changes):
    return timm.create_model(f"local-dir:{directory}", pretrained=True, **changes).eval()


@torch.no_grad()
def outputs(tower, images):
    scores = SCORES if tower.pruning.reducer == "golden" else None
    return tower.forward_pruned(images, scores)


def assert_same_tower(tower, back, images):
    own, theirs = tower.state_dict(), back.state_dict()
    assert set(own) == set(theirs) and all(torch.equal(own[key], theirs[key]) for key in own)
    for one, other in zip(outputs(tower, images), outputs(back, images)):
        assert (one is other is None) or torch.equal(one, other)
    left_out = {"predictor_path": None, "predictor_init": None}
    assert vars(tower.pruning) | left_out == vars(back.pruning) | left_out


@pytest.fixture
def fitted():
    return timm.create_model(DIGITS, pretrained=True, keep_rate=0.55, locations=(4, 7)).eval()


@pytest.mark.parametrize("reducer", REDUCERS)
def test_every_reducer_comes_back_bit_for_bit(images, tmp_path, reducer):
    tower = timm.create_model(DIGITS, pretrained=True, cls_only_last=False).eval()
    settings = {"locations": (2, 5), "drop_counts": (9, 20), "seed": 3}
    if REDUCERS[reducer].fitted:
        prior = Prior.from_scores(torch.rand(64), 64, (8, 8))
        module = prior if reducer == "prior" else create_predictor("transformer", 64, (8, 8), dim=32, head="mean")
        settings["predictor"] = module.eval()
    tower.set_pruning(reducer=reducer, **settings)
    save_pretrained(tower, tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert back.pruning.reducer == reducer and back.drop_counts == (9, 20) and not back.cls_only
    assert_same_tower(tower, back, images)
    assert getattr(back.pruner.reducer, "about", {}) == {}
    assert sorted(os.listdir(tmp_path)) == ["saved"]
    assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_comes_back(images, tmp_path, name, fitted):
    settings = {} if name == "prior" else {"dim": 24}
    predictor = create_predictor(name, 64, (8, 8), **settings).eval()
    if name == "prior":
        predictor = Prior.from_scores(torch.rand(64), 64, (8, 8))
    fitted.set_pruning(predictor=predictor)
    save_pretrained(fitted, tmp_path / "saved")
    assert_same_tower(fitted, load(tmp_path / "saved"), images)


def test_a_fitted_predictor_is_still_tied_to_its_weights(images, tmp_path, fitted):
    about = fitted.pruner.reducer.about
    assert about["model"]["sha256"] == fitted.blocks_sha256()
    save_pretrained(fitted, tmp_path / "one")
    back = load(tmp_path / "one")
    assert back.pruner.reducer.about == about
    assert_same_tower(fitted, back, images)
    save_pretrained(back, tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    torch.save(timm.create_model(DIGITS).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="was fitted to patchrank_clip_digits"):
        load_tower(back, tmp_path / "other.pt")
    assert_same_tower(fitted, back, images)


def test_nothing_of_this_machine_is_in_the_config(tmp_path, fitted):
    save_pretrained(fitted, tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert str(WEIGHTS) not in text and str(tmp_path) not in text
    assert json.loads(text)["model_args"]["act_layer"] == "gelu"


def test_what_is_said_anew_wins(images, tmp_path, fitted):
    save_pretrained(fitted, tmp_path / "saved")
    assert load(tmp_path / "saved", keep_rate=0.25).drop_counts == (24, 24)
    whole = load(tmp_path / "saved", keep_rate=1.0)
    assert whole.pruner is None
    expected = timm.create_model(DIGITS, pretrained=True).eval()
    assert torch.equal(whole(images), expected(images))
    assert load(tmp_path / "saved", reducer="random").pruning.reducer == "random"
    shipped = load(tmp_path / "saved", predictor_path=WEIGHTS / f"{DIGITS}.predictor.safetensors")
    assert_same_tower(fitted, shipped, images)
    with pytest.raises(UserError, match="of predictor_init was fitted for location 4, but this tower has 5"):
        load(tmp_path / "saved", locations=(5, 6))


def test_live_changes_are_saved_and_work_on_what_was_loaded(images, tmp_path, fitted):
    fitted.set_pruning(keep_rate=0.5)
    save_pretrained(fitted, tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert back.drop_counts == (16, 16)
    back.set_pruning(keep_rate=0.75)
    assert back.drop_counts == (8, 8)
    back.set_pruning(keep_rate=1.0)
    assert back.pruner is None
    back.set_pruning(keep_rate=0.5)
    assert_same_tower(fitted, back, images)


def test_quick_gelu_and_changed_shapes(images, tmp_path):
    shape = {"img_size": 48, "embed_dim": 32, "depth": 5, "num_heads": 2, "num_classes": 7, "act_layer": "quick_gelu"}
    tower = timm.create_model(DIGITS, keep_rate=0.5, reducer="center", locations=(2, 3), **shape).eval()
    save_pretrained(tower, tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert type(back.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert_same_tower(tower, back, images[..., :48, :48])
    chosen_by_entry = timm.create_model("patchrank_clip_b16", patch_size=112, depth=1, locations=(1,)).eval()
    save_pretrained(chosen_by_entry, tmp_path / "b16")
    assert json.loads((tmp_path / "b16" / "config.json").read_text())["model_args"]["act_layer"] == "quick_gelu"


def test_other_precisions_and_memory_formats(images, tmp_path, fitted):
    expected = {key: value.clone() for key, value in fitted.state_dict().items()}
    fitted.to(memory_format=torch.channels_last)
    save_pretrained(fitted, tmp_path / "channels_last")
    assert_same_tower(fitted, load(tmp_path / "channels_last"), images)
    fitted.pruner.reducer.predictor.half().float()
    rounded = {key: value.clone() for key, value in fitted.state_dict().items()}
    save_pretrained(fitted.half(), tmp_path / "half")  # the tower's weights ship in half precision, so nothing is lost
    back = load(tmp_path / "half").state_dict()
    assert all(torch.equal(back[key], value) for key, value in rounded.items()) and set(back) == set(expected)
    save_pretrained(fitted.bfloat16(), tmp_path / "brain")  # rounding makes another tower, whose predictor is saved so
    brain = load(tmp_path / "brain")
    assert torch.equal(brain.pos_embed, fitted.pos_embed.float()) and brain.drop_counts == fitted.drop_counts
    assert load(tmp_path / "brain", dtype=torch.bfloat16).drop_counts == fitted.drop_counts


def test_without_its_weights_it_ranks_nothing(images, tmp_path, fitted):
    save_pretrained(fitted, tmp_path / "saved")
    with pytest.raises(UserError, match="the predictor has no weights"):
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=False)(images)
    path, described = tmp_path / "saved" / "model.safetensors", dict(fitted.pruner.reducer.about)
    save_file({key: value for key, value in load_file(path).items() if not key.startswith("pruner.")}, path)
    for adapted in ({}, {"num_classes": 3}):  # where timm would not be strict
        with pytest.raises(UserError, match=r"brings no predictor \(pruner.\*\)"):
            load(tmp_path / "saved", **adapted)
    with pytest.raises(UserError, match="the predictor has no weights"):
        fitted.set_pruning(reducer="random")
        fitted.set_pruning(reducer="predictor", predictor_path=None, predictor_init=described)
    assert fitted.pruning.reducer == "random"


def test_a_predictor_that_is_only_described_cannot_be_saved(tmp_path, fitted):
    about = dict(fitted.pruner.reducer.about)
    tower = type(fitted)(
        img_size=64, patch_size=8, embed_dim=64, depth=12, num_heads=4, num_classes=64, pre_norm=True,
        keep_rate=0.5, predictor_init=about,
    )  # fmt: skip
    tower.pretrained_cfg = fitted.pretrained_cfg
    with pytest.raises(UserError, match="the predictor has no weights"):
        save_pretrained(tower, tmp_path / "saved")
    partial = {key: value for key, value in fitted.state_dict().items() if "token_mixing" not in key}
    tower.load_state_dict(partial, strict=False)
    with pytest.raises(UserError, match="the predictor has no weights"):
        tower(torch.zeros(1, 3, 64, 64))
    tower.load_state_dict(fitted.state_dict(), strict=False)
    assert tower(torch.zeros(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize(
    "record, message",
    [
        ("rando", "predictor_init is 'rando', but should be 'random', or should be a valid dictionary"),
        ({"name": "mix_mlp"}, "needs name, kwargs, grid, embed_dim, location, but lacks 'kwargs'"),
        ({"name": "mixmlp"}, "did you mean 'mix_mlp'"),
        ({"kwargs": {"width": 3}}, "predictor_init: describes no predictor.*unexpected keyword argument 'width'"),
        ({"grid": [7, 7]}, r"predictor of predictor_init was fitted for grid \[7, 7\], but this tower has \[8, 8\]"),
    ],
)
def test_records_of_predictors_are_checked(tower, record, message):
    whole = {"name": "mix_mlp", "kwargs": {}, "grid": [8, 8], "embed_dim": 64, "location": 4}
    incomplete = isinstance(record, str) or message.startswith("needs")
    with pytest.raises(UserError, match=message):
        tower.set_pruning(keep_rate=0.5, predictor_init=record if incomplete else whole | record)
    assert tower.pruner is None


def test_modules_that_cannot_be_made_again_are_refused(tmp_path, tower):
    class Own(nn.Module):
        def __init__(self, embed_dim, grid_size, power=1):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(power))

        def forward(self, cls, patches):
            return patches.mean(-1)

    tower.set_pruning(keep_rate=0.5, predictor=Own(64, (8, 8), 2))
    with pytest.raises(UserError, match="class Own is not registered"):
        save_pretrained(tower, tmp_path / "saved")
    register_predictor("own")(Own)
    try:
        with pytest.raises(UserError, match="'own' takes power, but has no attribute `settings`"):
            save_pretrained(tower, tmp_path / "saved")
        tower.pruner.reducer.predictor.settings = {"power": 1}
        with pytest.raises(UserError, match="not what its settings {'power': 1} make"):
            save_pretrained(tower, tmp_path / "saved")
        tower.pruner.reducer.predictor.settings = {"power": 2}
        save_pretrained(tower, tmp_path / "saved")
        assert torch.equal(load(tmp_path / "saved").pruner.reducer.predictor.weight, torch.ones(2))
    finally:
        del PREDICTORS["own"]


def test_directories_are_written_whole_or_not_at_all(images, tmp_path, fitted, monkeypatch):
    target = tmp_path / "deep" / "saved"
    save_pretrained(fitted, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    fitted.set_pruning(keep_rate=0.25)
    move = os.rename

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("save_file", "save_config_for_hf", "os.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(f"patchrank.models.checkpoints.save.{name}", fail)
            with pytest.raises(UserError, match="cannot write .*saved: No space left"):
                save_pretrained(fitted, target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert os.listdir(tmp_path / "deep") == ["saved"]
    with monkeypatch.context() as patch:  # at the very last step
        patch.setattr(
            "patchrank.models.checkpoints.save.os.rename", lambda a, b: fail() if str(a).endswith("new") else move(a, b)
        )
        with pytest.raises(UserError, match="cannot write .*saved: No space left"):
            save_pretrained(fitted, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert os.listdir(tmp_path / "deep") == ["saved"]
    save_pretrained(fitted, target)  # replaces the earlier tower
    assert load(target).drop_counts == (24, 24)
    assert os.listdir(tmp_path / "deep") == ["saved"]
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files, such as 'notes.txt'"):
        save_pretrained(fitted, target)
    with pytest.raises(UserError, match="it exists and is no directory"):
        save_pretrained(fitted, target / "notes.txt")
    with pytest.raises(UserError, match="cannot write .*: (Not a directory|File exists)"):
        save_pretrained(fitted, target / "notes.txt" / "saved")
    with pytest.raises(UserError, match="saved to a local directory"):
        save_pretrained(fitted, "memory://saved")


@pytest.mark.parametrize("directory", [None, 3, "a\0b", "x" * 300, "~no-such-user/x"])
def test_what_is_no_directory_is_refused(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot write .*: it can be no directory"):
        save_pretrained(timm.create_model(DIGITS), directory)


def test_what_is_no_tower_of_ours(tmp_path, tower):
    with pytest.raises(UserError, match="but got a Linear"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "saved")
    tower = timm.create_model("patchrank_clip_digits", norm_layer=nn.LayerNorm)
    with pytest.raises(UserError, match="cannot be saved: Model argument 'norm_layer' is not serializable"):
        save_pretrained(tower, tmp_path / "saved")
    assert os.listdir(tmp_path) == []
