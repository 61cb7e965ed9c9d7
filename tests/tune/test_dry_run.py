"""What `--dry-run` says: counts that can be checked by hand, against shards and records that were made."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchrank.config import TrialConfig
from patchrank.golden.make_shards import make_shards
from patchrank.golden.scores import score_images
from patchrank.trial.inputs import load_inputs
from patchrank.trial.run import needed_shards, run_trial
from patchrank.tune.forecast import estimate as module
from patchrank.tune.forecast import timing
from patchrank.tune.forecast.counting import prefix_macs, score_macs, suffix_macs
from patchrank.tune.forecast.estimate import Cost, Estimate, estimate
from patchrank.tune.ray_tasks import Job

SMALL = {"n_train": 24, "n_val": 16, "n_test": 16}


def config(**changes) -> TrialConfig:
    raw = TrialConfig(
        data={"tasks": ["digits"], **SMALL}, predictor={"epochs": 3}, pruning={"keep_rate": 0.6}
    ).model_dump()
    for path, value in changes.items():
        section, _, key = path.partition("__")
        raw[section] = value if not key else raw[section] | {key: value}
    return TrialConfig.model_validate(raw)


@pytest.fixture(scope="module")
def inputs():
    return load_inputs(config())


@pytest.fixture(autouse=True)
def no_subprocess(monkeypatch):
    monkeypatch.setattr(timing.Timer, "start", lambda self: 5.0)


def jobs_of(trial, inputs, root):
    return [Job(trial, folder, folder.faults()) for _, folder in needed_shards(trial, inputs, root).values()]


def counted(tower, images, **golden) -> int:
    """MACs of golden scores as torch counts them, with attention in its plain form so that nothing hides."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        score_images(tower, images, stride=1, metrics=["preservation"], **golden)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("golden", [{"window": 2, "remove_at": 4}, {"window": 3, "remove_at": 1}])
def test_macs_of_golden_scores_are_those_that_torch_counts(tower, images, golden):
    squares = (8 - golden["window"] + 1) ** 2
    spread = squares * tower.num_patches  # damage of windows over tokens, which is no part of the tower
    ours = score_macs(tower, squares, rounds=1, **golden) + spread
    assert len(images) * ours == counted(tower, images, rounds=1, **golden)


def test_macs_of_more_rounds_are_at_most_a_seventh_above_those_that_torch_counts(tower, images):
    theirs = counted(tower, images, window=2, remove_at=4, rounds=4)
    ours = score_macs(tower, 49, window=2, remove_at=4, rounds=4) * len(images)
    assert theirs <= ours <= 8 / 7 * theirs


def test_prefix_and_suffix_are_the_whole(tower):
    whole = suffix_macs(tower, 65, 1) + prefix_macs(tower, 1)
    assert prefix_macs(tower, 4) + suffix_macs(tower, 65, 4) == whole
    assert prefix_macs(tower, 1) == 64 * tower.patch_embed.proj.weight[0].numel() * tower.embed_dim


def test_counts_and_bytes_are_those_of_shards_and_records_that_are_made(inputs, tmp_path):
    trial, root = config(), str(tmp_path / "shards")
    jobs = jobs_of(trial, inputs, root)
    found = estimate(jobs, [trial], lambda _: inputs, quiet=True)
    assert (found.shards.count, found.shards.images, found.shards.forwards) == (2, 40, 40 * 49)
    assert (found.trials.count, found.trials.forwards) == (1, 2 * 32)  # each image unpruned, and pruned
    for split, folder in needed_shards(trial, inputs, root).values():
        make_shards(inputs.clip, split, folder, quiet=True)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))
    assert found.shards.num_bytes == pytest.approx(written, rel=0.1)
    run_trial(trial, inputs, str(tmp_path), root, "test", quiet=True)
    written = sum(path.stat().st_size for path in (tmp_path / "trials").iterdir())
    assert found.trials.num_bytes == pytest.approx(written, rel=0.15)
    again = estimate(jobs_of(trial, inputs, root), [], lambda _: inputs, quiet=True)
    assert again.shards == Cost() and again.trials == Cost() and again.starting == 0


def test_shards_that_are_there_are_not_counted(inputs, tmp_path):
    trial = config()
    first, second = jobs_of(trial, inputs, str(tmp_path))
    first.faults.clear()
    found = estimate([first, second], [], lambda _: inputs, quiet=True)
    assert (found.shards.count, found.shards.images) == (1, second.folder.header["data"]["count"])


@pytest.fixture
def fixed(monkeypatch):
    """A clock by which every step takes as long as it has cost: 1 second each, so that sums can be done by hand."""
    monkeypatch.setattr(timing.Timer, "_time", lambda self, step: (step(), 1.0)[1])


def test_what_trials_share_counts_once(inputs, fixed):
    trial = config()
    one = estimate([], [trial], lambda _: inputs, quiet=True).trials.seconds
    other_rate = estimate([], [trial, config(pruning__keep_rate=0.5)], lambda _: inputs, quiet=True).trials.seconds
    other_seed = estimate([], [trial, config(seed=1)], lambda _: inputs, quiet=True).trials.seconds
    fit = 3 / timing.FIT_STEPS
    quality = 16 / timing.IMAGES
    assert other_seed - one == pytest.approx((other_rate - one) + fit + quality, rel=0.2)
    assert other_rate - one < 0.7 * one


def test_two_workers_load_their_images_both(inputs, fixed):
    trials = [config(pruning__keep_rate=rate) for rate in (0.4, 0.5, 0.6, 0.7)]
    alone = estimate([], trials, lambda _: inputs, slots=1, quiet=True)
    both = estimate([], trials, lambda _: inputs, slots=2, quiet=True)
    assert both.trials.seconds > alone.trials.seconds
    assert both.seconds < alone.seconds


def test_controls_and_oracles_count(inputs, fixed):
    plain = estimate([], [config()], lambda _: inputs, quiet=True).trials
    controlled = estimate([], [config(controls=["random", "reversed"])], lambda _: inputs, quiet=True).trials
    assert controlled.forwards - plain.forwards == 2 * 16
    oracle = config(pruning__reducer="golden", data__n_oracle=4)
    assert estimate([], [oracle], lambda _: load_inputs(oracle), quiet=True).trials.forwards == 32 + 16 + 4


def test_prompts_count_by_the_steps_that_their_own_dry_run_times(inputs, monkeypatch):
    monkeypatch.setattr(timing, "dry_run", lambda clip, train, config, seed: {"seconds_per_step": 2.0})
    plain = estimate([], [config()], lambda _: inputs, quiet=True).trials.seconds
    tuned = config(prompt={"mode": "T", "shots": 2, "epochs": 3, "batch_size": 4})
    found = estimate([], [tuned], lambda _: inputs, quiet=True).trials.seconds
    assert found - plain == pytest.approx(2.0 * 3 * (20 // 4), rel=0.2)


def test_nothing_is_left_changed(inputs):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    before = np.asarray([weight.detach().double().sum() for weight in inputs.clip.parameters()])
    estimate([], [config(pruning__keep_rate=0.3)], lambda _: inputs, cpu=1, quiet=True)
    assert inputs.clip.visual.pruner is None and torch.get_num_threads() == threads
    assert (np.asarray([weight.detach().double().sum() for weight in inputs.clip.parameters()]) == before).all()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_lines_say_what_they_assume():
    shards = Cost(54, 3060, 197_880, 4_700_000_000_000, 32 << 20, 216.0)
    lines = Estimate(shards, Cost(count=54, seconds=77.0), 27.0, 2, "cpu", 1).lines()
    assert lines[0] == (
        "golden shards: 54 to make of 3,060 images, 197,880 forwards of windows, 4.7 TMACs, 32 MiB, about 1.8 min"
    )
    assert "about 2.9 min, 27 s of it to start" in lines[2] and "this machine's cpu with 1 thread," in lines[3]
    assert module._time(7200 * 4) == "8.0 h" and module._bytes(5 << 40) == "5 TiB"
