import json
from types import SimpleNamespace

import pytest
import torch
from helpers.coop_copies import make_named
from PIL import Image

from patchrank.config import DataConfig, PromptConfig
from patchrank.data.dataset_factory import load_split
from patchrank.data.digits.scenes import DigitScenes
from patchrank.data.few_shot import few_shot
from patchrank.evaluate import main as evaluate_main
from patchrank.models.clip import create_clip
from patchrank.models.prompt_files import load_prompts
from patchrank.prompt import train_step as learning
from patchrank.prompt import tuning
from patchrank.prompt.__main__ import main as prompt_main
from patchrank.prompt.batches import Augment, Feed, load_train
from patchrank.prompt.presets import complete, learning_rates
from patchrank.prompt.tuning import accuracy, state_path, tune_prompts
from patchrank.utils.errors import UserError

# facts that others published: CoOp's rates at 50 epochs, MaPLe's at 5
COOP = (1e-5, 0.002, 0.00199803, 0.00199211, 0.00198229)
MAPLE = (1e-5, 0.0035, 0.00316578, 0.00229078, 0.00120922)


@pytest.fixture(scope="module")
def train():
    return load_train("digits_ink", PromptConfig(shots=1), 1)


@pytest.fixture(scope="module")
def val():
    return load_split("digits_ink", "val", 30)


def config(mode="TV", **changes):
    named = dict(mode=mode, num_tokens=2, preset="maple", epochs=3, lr=0.05, batch_size=4, augment=False)
    return PromptConfig(**named | changes)


def content(path):
    return (path.read_bytes(), path.with_name(path.name + ".state").exists())


def test_learning_rates_are_the_published_ones():
    assert learning_rates(0.002, 50)[:5] == pytest.approx(COOP, rel=1e-5)
    assert learning_rates(0.002, 50)[-1] == pytest.approx(7.885e-6, rel=1e-3)
    assert learning_rates(0.0035, 5) == pytest.approx(MAPLE, rel=1e-5)
    assert len(learning_rates(0.002, 50)) == 50 and learning_rates(1.0, 1) == [1e-5]


def test_what_is_left_open_comes_from_the_preset_and_the_tower(clip):
    text, both = (complete(PromptConfig(mode=mode), clip, "digits") for mode in ("T", "TV"))
    assert (text.preset, text.lr, text.batch_size, text.epochs) == ("coop", 0.002, 32, 50)
    assert (both.preset, both.lr, both.batch_size, both.epochs) == ("digits", 0.1, 4, 15)
    assert both.num_tokens == 4 and both.words == "a photo of the" and not both.augment
    maple = complete(PromptConfig(preset="maple", num_tokens=3), clip, "digits")
    assert (maple.lr, maple.batch_size, maple.epochs, maple.words) == (0.0035, 4, 5, None)
    distil = complete(PromptConfig(mode="V", loss="distill"), clip, "digits")
    assert (distil.preset, distil.images) == ("distill", 1024)
    named = complete(PromptConfig(mode="TV", preset="coop", epochs=2, words="a photo of"), clip, "caltech101")
    assert (named.lr, named.epochs, named.num_tokens, named.augment) == (0.002, 2, 3, True)
    large = SimpleNamespace(visual=SimpleNamespace(num_patches=196), name="patchrank_clip_b16")
    assert complete(PromptConfig(), large, "digits").num_tokens == 16
    assert complete(PromptConfig(), large, "digits").preset == "maple"


def test_shots_are_drawn_as_coop_draws_them():
    whole, drawn = DigitScenes("adapt"), load_train("digits", PromptConfig(shots=2), 3)
    places = few_shot(whole.labels.tolist(), [], 2, 3)[0]
    assert drawn.ids == [whole.ids[i] for i in places] and sorted(drawn.labels) == sorted(2 * list(range(10)))


@pytest.mark.parametrize("mode", ("T", "V", "TV"))
def test_frozen_means_frozen(clip, train, tmp_path, mode):
    clip.visual.set_pruning(keep_rate=0.5)
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    assert any(key.startswith("visual.pruner.") for key in before)
    flags = [parameter.requires_grad for parameter in clip.parameters()]
    tuned = tune_prompts(clip, train, None, config(mode, epochs=2), 1, str(tmp_path / "p"), quiet=True)
    after = clip.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert clip.prompts is None and all(parameter.grad is None for parameter in clip.parameters())
    assert flags == [parameter.requires_grad for parameter in clip.parameters()]
    start = learning.start(clip, train, config(mode, epochs=2), 1).prompts.state_dict()
    assert not any(torch.equal(start[key], value) for key, value in tuned.prompts.state_dict().items())


def test_tuning_learns_what_it_is_shown(clip, train, tmp_path):
    tuned = tune_prompts(
        clip, train, None, config(epochs=10, lr=0.02, batch_size=10), 1, str(tmp_path / "p"), quiet=True
    )
    losses = [epoch["loss"] for epoch in tuned.about["history"]]
    assert losses[-1] < 0.8 * losses[0]


def test_a_seed_gives_the_same_bytes_twice_and_another_one_others(clip, train, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path, seed in zip(paths, (1, 1, 2)):
        tune_prompts(clip, train, None, config(epochs=2), seed, str(path), quiet=True)
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again != other


@pytest.mark.parametrize("patience", (pytest.param(None, marks=pytest.mark.slow), 1))
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    clip, train, val, tmp_path, killed_in_second_epoch, patience
):
    settings, whole, cut = config(epochs=4, patience=patience, lr=0.2), tmp_path / "whole", tmp_path / "cut"
    tune_prompts(clip, train, val, settings, 1, str(whole), quiet=True)
    epochs = killed_in_second_epoch()
    with pytest.raises(KeyboardInterrupt):
        tune_prompts(clip, train, val, settings, 1, str(cut), quiet=True)
    assert epochs == [0, 1] and not cut.exists() and clip.prompts is None
    tune_prompts(clip, train, val, settings, 1, str(cut), quiet=True)
    assert epochs[2] == 1  # the first is not done again
    assert content(cut) == content(whole) and not content(cut)[1]
    count = len(epochs)
    again = tune_prompts(clip, train, val, settings, 1, str(cut), quiet=True)
    assert len(epochs) == count and again.seconds == []


def test_a_state_of_another_run_or_a_damaged_one_is_left_alone(clip, train, tmp_path, capsys, monkeypatch):
    path, state = tmp_path / "p", tmp_path / "p.state"
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "save_prompts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tune_prompts(clip, train, None, config(epochs=1), 1, str(path), quiet=True)
    assert state_path(str(path)) == str(state) and state.exists()
    tune_prompts(clip, train, None, config(epochs=1), 2, str(path), quiet=True)
    assert "of a run with other settings" in capsys.readouterr().err
    state.write_bytes(b"no tensors")
    fresh = tmp_path / "fresh"
    for place in (path, fresh):
        tune_prompts(clip, train, None, config(epochs=1), 3, str(place), quiet=True)
    assert "cannot be read" in capsys.readouterr().err and path.read_bytes() == fresh.read_bytes()


def test_early_stop_keeps_the_best_epoch_on_val(clip, train, val, tmp_path, monkeypatch):
    found = iter([50.0, 70.0, 70.0, 60.0, 90.0])
    monkeypatch.setattr(tuning, "accuracy", lambda *_: next(found))
    stopped, short = tmp_path / "stopped", tmp_path / "short"
    tuned = tune_prompts(clip, train, val, config(epochs=5, patience=2), 1, str(stopped), quiet=True)
    assert [epoch["val_accuracy"] for epoch in tuned.about["history"]] == [50, 70, 70, 60] and tuned.about["epoch"] == 2
    assert tuned.about["seen"]["images"] == len(train) + len(val)
    monkeypatch.setattr(tuning, "learning_rates", lambda lr, epochs: learning_rates(lr, 5)[:epochs])
    whole = tune_prompts(clip, train, None, config(epochs=2), 1, str(short), quiet=True)
    assert torch.equal(tuned.prompts.text, whole.prompts.text)


def test_cached_embeddings_change_nothing(clip, train, tmp_path):
    """To float noise: kernels sum in another order where batches are of another size."""
    clip.visual.set_pruning(keep_rate=0.6)
    settings = config("T", batch_size=5)
    assert Feed(clip, train, settings, 1).cached and not Feed(clip, train, settings, 1, cache=False).cached
    learned = []
    for cache in (True, False):
        path = str(tmp_path / str(cache))
        learned.append(tune_prompts(clip, train, None, settings, 1, path, quiet=True, cache=cache).prompts.text)
    torch.testing.assert_close(*learned, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("mode", ("T", "TV"))
def test_checkpointing_changes_nothing_but_memory(clip, train, tmp_path, mode, monkeypatch):
    clip.visual.set_pruning(keep_rate=0.6)
    calls, real = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "torch.utils.checkpoint.checkpoint", lambda *args, **named: calls.append(1) or real(*args, **named)
    )
    files = [tmp_path / name for name in "ab"]
    for path, checkpointing in zip(files, (False, True)):
        settings = config(mode, epochs=2, checkpointing=checkpointing)
        tune_prompts(clip, train, None, settings, 1, str(path), quiet=True)
        assert bool(calls) == checkpointing
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not clip.visual.grad_checkpointing and not clip.text.transformer.grad_checkpointing


@pytest.mark.parametrize("mode", ("T", "TV"))
def test_mixed_precision_learns_fp32_numbers_close_to_those_of_fp32(clip, train, mode):
    clip.visual.set_pruning(keep_rate=0.6)
    losses, gradients = [], []
    for precision in ("fp32", "bf16"):
        settings, few = config(mode, precision=precision), train.first(4)
        with learning.ready(clip, settings):
            state, feed = learning.start(clip, few, settings, 1), Feed(clip, few, settings, 1, cache=False)
            state.optimizer.param_groups[0]["lr"] = 0.1
            clip.set_prompts(state.prompts)
            losses.append(learning.step(feed, state, *next(feed.batches(0)))[0])
            gradients.append(state.prompts.text.grad)
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)
    assert gradients[1].dtype == torch.float32 == state.prompts.text.dtype
    assert torch.cosine_similarity(*(each.flatten() for each in gradients), dim=0) > 0.9


def test_every_epoch_has_an_order_of_its_own_and_leaves_a_rest_out(clip, train):
    feed = Feed(clip, train, config(batch_size=4), 1)
    orders = [[label for _, labels in feed.batches(epoch) for label in labels.tolist()] for epoch in (0, 1, 0)]
    assert feed.steps == 2 and len(orders[0]) == 8 and orders[0] == orders[2] != orders[1]
    assert Feed(clip, train, config(batch_size=99), 1).steps == 1
    with learning.ready(clip, config()):
        assert len(next(Feed(clip, train, config(batch_size=99), 1).batches(0))[1]) == len(train)


def test_augmentation_depends_on_seed_epoch_and_image_alone(clip):
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    state, augment = torch.get_rng_state(), Augment(clip, 1)
    first = augment(image, 0, 3)
    assert first.shape == (3, 64, 64) and torch.equal(first, Augment(clip, 1)(image, 0, 3))
    assert torch.equal(state, torch.get_rng_state())
    others = (augment(image, 1, 3), augment(image, 0, 4), Augment(clip, 2)(image, 0, 3))
    assert not any(torch.equal(first, other) for other in others)
    draws = [augment._draw(image, seed) for seed in range(200)]
    areas = [height * width / 6300 for (_, _, height, width), _ in draws]
    assert 0.07 < min(areas) < 0.2 and 0.9 < max(areas) <= 1 and 70 < sum(flip for _, flip in draws) < 130


def test_photographs_are_augmented_and_repeatable(clip, tmp_path):
    make_named(tmp_path / "data", "caltech101")
    drawn = load_train("caltech101", PromptConfig(shots=2), 1, DataConfig(root=str(tmp_path / "data")))
    settings = complete(config("T", augment=None), clip, "caltech101")
    assert settings.augment and len(drawn) == 12 and not Feed(clip, drawn, settings, 1).cached
    files = [tmp_path / name for name in "ab"]
    for path in files:
        tune_prompts(clip, drawn, None, settings, 1, str(path), quiet=True)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_images_without_names_are_refused(tmp_path):
    for n in range(2):
        path = tmp_path / "train" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (n, 0, 0)).save(path)
    with pytest.raises(UserError, match="folder/train: prompts need labels and class names, but there are no labels"):
        load_train("folder", PromptConfig(shots=1), 1, DataConfig(root=str(tmp_path)))


def test_a_loss_that_is_no_number_ends_the_run(clip, train, tmp_path):
    with pytest.raises(UserError, match="the loss is (nan|inf) at learning rate .*; try a lower --lr"):
        tune_prompts(clip, train, None, config(lr=1e30), 1, str(tmp_path / "p"), quiet=True)
    assert clip.prompts is None


def test_class_specific_tokens_and_words(clip, train, tmp_path):
    settings = complete(config("T", class_specific=True, words="a photo of", num_tokens=None, epochs=2), clip, "digits")
    tuned = tune_prompts(clip, train, None, settings, 1, str(tmp_path / "p"), quiet=True)
    assert tuned.prompts.text.shape[:2] == (10, 3) and not torch.equal(*tuned.prompts.text[:2])


FLAGS = ["--data", "digits", "--keep-rate", "0.6", "--seed", "1"]


def test_the_command_ends_with_a_row_that_evaluate_confirms(tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "p.safetensors")
    flags = [*FLAGS, "--limit", "64", "--shots", "2", "--epochs", "2", "--lr", "0.3", "--out", out]
    prompt_main(flags)
    said, told = capsys.readouterr()
    row = json.loads(said)
    assert "learned from                         20 images, 20 labels\n" in told and "without prompts" in told
    evaluate_main([*FLAGS, "--limit", "64", "--prompts", out])
    evaluated = json.loads(capsys.readouterr().out)
    assert row["accuracy"] == evaluated["accuracy"] and row["gmacs"] == evaluated["gmacs"]
    evaluate_main([*FLAGS, "--limit", "64"])
    assert row["accuracy_zero_shot"] == json.loads(capsys.readouterr().out)["accuracy"]
    assert (row["mode"], row["num_tokens"], row["preset"], row["split"]) == ("TV", 4, "digits", "val")
    assert row["n_seen_images"] == row["n_seen_labels"] == 20 and row["seconds_per_epoch"] > 0
    assert load_prompts(out)[1]["pruning"]["keep_rate"] == 0.6 and list((tmp_path / "p.safetensors.logs").iterdir())
    monkeypatch.setattr("patchrank.prompt.__main__.tune_prompts", lambda *_, **__: pytest.fail("it was done"))
    prompt_main(flags)
    assert json.loads(capsys.readouterr().out) == row


def test_mode_none_learns_nothing(tmp_path, capsys, clip):
    out = tmp_path / "p"
    prompt_main([*FLAGS, "--mode", "none", "--limit", "20", "--out", str(out)])
    row = json.loads(capsys.readouterr().out)
    clip.visual.set_pruning(keep_rate=0.6)
    assert row["accuracy"] == row["accuracy_zero_shot"] == accuracy(clip, load_split("digits", "val", 20))
    assert row["n_seen_images"] == 0 and row["shots"] is None and not out.exists()


def test_a_dry_run_tells_time_and_memory_and_leaves_nothing(tmp_path, capsys):
    prompt_main([*FLAGS, "--shots", "2", "--dry-run", "--out", str(tmp_path / "p")])
    said, told = capsys.readouterr()
    row = json.loads(said)
    assert "75 steps" in told and "memory at most" in told
    assert row["steps"] == 5 * 15 and row["seconds_per_step"] > 0 and row["memory_mib"] > 100
    assert row["seconds"] == pytest.approx(75 * row["seconds_per_step"], rel=0.05) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, message",
    (
        (["--prompts", "x"], "--prompts: tuning starts from"),
        (["--split", "adapt"], "--split adapt: prompts are tuned on it"),
        (["--class-specific"], "class-specific prompts need mode 'T'"),
        (["--words", "a photo", "--num-tokens", "3"], "words to start from must be"),
        (["--data", "digit"], "data 'digit' does not exist"),
        (["--mode", "none", "--dry-run"], "mode none tunes nothing"),
        (["--mode", "V", "--loss", "distill", "--dry-run"], "nothing is pruned; try a lower keep_rate"),
        (["--loss", "distill"], "^flags: loss 'distill' learns visual tokens alone, so mode must be 'V', but is 'TV'$"),
    ),
)
def test_flags_that_make_no_sense_are_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prompt_main(["--shots", "1", "--out", str(tmp_path / "p"), *flags])


@pytest.mark.parametrize(
    "content",
    ['{"key": "other", "row": {}}', *(pytest.param(each, marks=pytest.mark.slow) for each in ('{"a": 1}', "[1]"))],
)
def test_a_row_that_is_not_this_runs_is_made_again(tmp_path, capsys, content):
    out = tmp_path / "p"
    flags = [*FLAGS, "--limit", "10", "--shots", "1", "--epochs", "1", "--out", str(out)]
    prompt_main(flags)
    row = json.loads(capsys.readouterr().out)
    (tmp_path / "p.row.json").write_text(content)
    prompt_main(flags)
    again = json.loads(capsys.readouterr().out)
    assert {**again, "seconds_per_epoch": 0} == {**row, "seconds_per_epoch": 0}
    prompt_main([*flags, "--seed", "2"])  # another run's prompts take the place
    capsys.readouterr()
    prompt_main(flags)
    assert json.loads(capsys.readouterr().out)["accuracy"] == row["accuracy"]
    assert load_prompts(out)[1]["seed"] == 1


def test_a_pair_that_has_prompts_tunes_as_one_without(clip, train, tmp_path):
    clip.visual.set_pruning(keep_rate=0.6)
    own = learning.start(clip, train, config("TV"), 7).prompts
    files = [tmp_path / name for name in "ab"]
    tune_prompts(clip, train, None, config("T"), 1, str(files[0]), quiet=True)
    clip.set_prompts(own)
    try:
        tune_prompts(clip, train, None, config("T"), 1, str(files[1]), quiet=True)
        assert clip.prompts is own and clip.visual.num_prompt_tokens == 2
    finally:
        clip.set_prompts(None)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_tower_with_prompts_of_its_own_keeps_them(clip, train, tmp_path):
    own = learning.start(clip, train, config("V"), 7).prompts
    clip.visual.set_prompts(own)
    try:
        tune_prompts(clip, train, None, config("T", epochs=1), 1, str(tmp_path / "p"), quiet=True)
        assert clip.visual.num_prompt_tokens == 2 and clip.prompts is None
    finally:
        clip.visual.set_prompts(None)
    with pytest.raises(UserError, match="of a pair it is prompts=FILE"):
        create_clip("patchrank_clip_digits", prompts_path=str(tmp_path / "p"))


def test_prompts_are_not_measured_on_what_they_learned_from(tmp_path):
    for n in range(20):
        path = tmp_path / "images" / str(n % 2) / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 20), 20 + n).save(path)
    where = ["--data", "folder", "--data-root", str(tmp_path / "images"), "--keep-rate", "0.5", "--mode", "V"]
    for how in (["--shots", "1"], ["--loss", "distill"]):
        with pytest.raises(UserError, match="split 'all': .* of its 20 images are those that prompts learn from"):
            prompt_main([*where, *how, "--split", "all", "--out", str(tmp_path / "p")])
    assert not (tmp_path / "p").exists()
