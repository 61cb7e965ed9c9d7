"""Recovery without labels: visual tokens, and gains of norms, that learn from the tower as it came."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from patchrank.config import DataConfig, PromptConfig, validate
from patchrank.data.dataset_factory import load_split
from patchrank.evaluate import main as evaluate_main
from patchrank.models.embed import evaluate
from patchrank.models.prompt_files import load_prompts
from patchrank.prompt import train_step as learning
from patchrank.prompt.__main__ import main as prompt_main
from patchrank.prompt.batches import Feed, load_train
from patchrank.prompt.presets import complete
from patchrank.prompt.tuning import tune_prompts
from patchrank.utils.errors import UserError


def config(**changes):
    named = dict(mode="V", loss="distill", num_tokens=2, preset="distill", epochs=3, batch_size=8, images=24)
    return PromptConfig(**named | dict(lr=0.01, augment=False) | changes)


@pytest.fixture
def pruned(clip):
    clip.visual.set_pruning(keep_rate=0.3)
    yield clip
    clip.set_prompts(None)


@pytest.fixture(scope="module")
def train():
    return load_train("digits_ink", config(), 0)


def test_its_images_are_the_first_of_the_training_split_and_need_no_labels(train, tmp_path):
    assert train.ids == load_split("digits_ink", "adapt", 24).ids
    for n in range(12):
        Image.effect_noise((40, 40), 40 + n).convert("RGB").save(tmp_path / f"{n}.png")
    found = load_train("folder", config(), 0, DataConfig(root=str(tmp_path)))
    assert found.labels is None and 0 < len(found) < 12  # val and test are other images


def test_targets_are_embeddings_of_the_tower_as_it_came(pruned, train):
    with torch.no_grad():
        pixels = next(iter(train.batches(pruned.transform(), 24)))[0]
        pruned.visual.set_pruning(keep_rate=1.0)
        whole = F.normalize(pruned.visual(pixels), dim=-1)
        pruned.visual.set_pruning(keep_rate=0.3)
    feeds = [Feed(pruned, train, config(), 1, cache) for cache in (True, False)]
    state = learning.start(pruned, train, config(norm_gains=True), 1)
    with learning.ready(pruned, config()):
        pruned.set_prompts(state.prompts)  # by which targets must not change
        for feed in feeds:
            found = {row.sum().item(): target for row, target in zip(*next(feed.batches(0)))}
            for pixel, target in zip(pixels, whole):
                if pixel.sum().item() in found:
                    torch.testing.assert_close(found.pop(pixel.sum().item()), target, atol=1e-5, rtol=1e-5)
            assert not found


@pytest.mark.parametrize("gains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_brings_embeddings_closer_and_freezes_the_rest(pruned, train, tmp_path, gains):
    before = {key: value.clone() for key, value in pruned.state_dict().items()}
    tuned = tune_prompts(
        pruned,
        train,
        None,
        config(epochs=30 if gains else 8, lr=0.005, norm_gains=gains),
        1,
        str(tmp_path / "p"),
        quiet=True,
    )
    history = tuned.about["history"]
    assert history[-1]["loss"] < history[1]["loss"] and history[-1]["cosine"] == pytest.approx(1 - history[-1]["loss"])
    assert "accuracy" not in history[0] and tuned.about["seen"]["images"] == 24 and tuned.about["seen"]["labels"] == 0
    assert all(torch.equal(before[key], value) for key, value in pruned.state_dict().items())
    assert pruned.prompts is None and (tuned.prompts.norm_gains is not None) == gains
    if not gains:  # tokens that start at random disturb before they help: closer than their start
        held = learning.start(pruned, train, config(), 1).prompts
    if not gains:
        found = []
        for prompts in (held, tuned.prompts):
            pruned.set_prompts(prompts)
            found.append(evaluate(pruned, train, quiet=True).cosine["pruned"].mean())
        assert found[1] > found[0]
    else:  # on the very images that it learned from
        plain = evaluate(pruned, train, quiet=True).cosine["pruned"].mean()
        pruned.set_prompts(tuned.prompts)
        assert evaluate(pruned, train, quiet=True).cosine["pruned"].mean() > plain


def test_labels_change_nothing(pruned, train, tmp_path):
    from dataclasses import replace

    files = [tmp_path / name for name in "ab"]
    for path, split in zip(files, (train, replace(train, labels=None, classes=(), templates=()))):
        tune_prompts(pruned, split, None, config(), 1, str(path), quiet=True)
    first, second = (load_prompts(path)[0].state_dict() for path in files)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("patience", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_a_killed_run_goes_on_with_adams_state_and_ends_with_the_same_bytes(
    pruned, train, tmp_path, killed_in_second_epoch, patience
):
    settings, whole, cut = config(norm_gains=True, patience=patience), tmp_path / "whole", tmp_path / "cut"
    val = load_split("digits_ink", "val", 8)
    tuned = tune_prompts(pruned, train, val, settings, 1, str(whole), quiet=True)
    assert ("val_cosine" in tuned.about["history"][0]) == bool(patience)
    epochs = killed_in_second_epoch()
    with pytest.raises(KeyboardInterrupt):
        tune_prompts(pruned, train, val, settings, 1, str(cut), quiet=True)
    tune_prompts(pruned, train, val, settings, 1, str(cut), quiet=True)
    assert epochs[:3] == [0, 1, 1] and cut.read_bytes() == whole.read_bytes()


def test_augmented_images_have_targets_of_their_own(pruned, train, tmp_path):
    settings = config(augment=True, epochs=2)
    with learning.ready(pruned, settings):
        pixels, targets = next(Feed(pruned, train, settings, 1).batches(0))
        whole = F.normalize(pruned.visual.forward_whole(pixels), dim=-1)
    assert torch.equal(targets, whole)
    tune_prompts(pruned, train, None, settings, 1, str(tmp_path / "p"), quiet=True)


def test_where_nothing_is_pruned_there_is_nothing_to_learn(clip, train, tmp_path):
    with pytest.raises(UserError, match="nothing is pruned; try a lower keep_rate"):
        tune_prompts(clip, train, None, config(), 1, str(tmp_path / "p"), quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mode": "TV"}, "loss 'distill' learns visual tokens alone, so mode must be 'V', but is 'TV'"),
        ({"mode": "T", "loss": "cross_entropy", "norm_gains": True}, "norm_gains are the image tower's"),
        ({"loss": "distil"}, "loss is 'distil'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        validate(PromptConfig, {"mode": "V", "loss": "distill"} | changes, "flags")


def test_the_command_needs_no_labels_and_evaluate_confirms_its_row(tmp_path, capsys):
    for n in range(24):
        Image.effect_noise((48, 48), 60 + n).convert("RGB").save(tmp_path / f"{n}.png")
    flags = ["--data", "folder", "--data-root", str(tmp_path), "--keep-rate", "0.4", "--seed", "1"]
    out = str(tmp_path / "out" / "p.safetensors")
    how = ["--mode", "V", "--loss", "distill", "--norm-gains", "--epochs", "2", "--out", out]
    prompt_main([*flags, *how])
    row = json.loads(capsys.readouterr().out)
    evaluate_main([*flags, "--split", "val", "--prompts", out])
    evaluated = json.loads(capsys.readouterr().out)
    assert row["cosine"] == evaluated["cosine"] and "accuracy" not in row
    evaluate_main([*flags, "--split", "val"])
    assert row["cosine_zero_shot"] == json.loads(capsys.readouterr().out)["cosine"]
    assert row["n_seen_labels"] == 0 < row["n_seen_images"] and row["shots"] is None and row["norm_gains"]


def test_it_defaults_to_adam_and_many_images(clip):
    found = complete(PromptConfig(mode="V", loss="distill"), clip, "digits")
    assert (found.lr, found.batch_size, found.epochs, found.images) == (0.003, 16, 8, 1024)
    assert isinstance(learning.start(clip, load_split("digits", "adapt", 2), found, 0).optimizer, torch.optim.Adam)
