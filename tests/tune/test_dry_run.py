"""What `--dry-run` says: counts that can be checked by hand, against shards and records that were made."""

import re

import pytest
import torch
from helpers.small_sweep import write_sweep
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchrank.config import TrialConfig
from patchrank.golden.make_shards import make_shards
from patchrank.golden.scores import score_images
from patchrank.trial.forecast import Work, count_shards, count_trial, prefix_macs, suffix_macs
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import run_trial
from patchrank.tune.driver import run_sweep
from patchrank.tune.plan import Job

SMALL = {"n_train": 24, "n_val": 16, "n_test": 16}
SPACE = "pruning.keep_rate: {grid: [0.9, 0.8]}"


def resolved(**changes) -> ResolvedTrial:
    raw = TrialConfig(
        data={"tasks": ["digits"], **SMALL}, predictor={"epochs": 3}, pruning={"keep_rate": 0.6}
    ).model_dump()
    for path, value in changes.items():
        section, _, key = path.partition("__")
        raw[section] = value if not key else raw[section] | {key: value}
    return ResolvedTrial(TrialConfig.model_validate(raw))


@pytest.fixture(scope="module")
def inputs():
    config = resolved().config
    return load_inputs(config.model, config.data)


def jobs_of(context: TrialContext) -> list[Job]:
    return [Job(context.trial, folder, folder.faults()) for _, folder in context.needed_shards.values()]


def counted_shards(context: TrialContext) -> Work:
    work = Work()
    for job in jobs_of(context):
        count_shards(job.folder, job.faults, context, work)
    return work


def counted(inputs, *trials: ResolvedTrial, workers: int = 1) -> Work:
    work = Work()
    for n, trial in enumerate(trials):
        count_trial(TrialContext(trial, inputs), n % workers, work)
    return work


def macs_that_torch_counts(tower, images, **golden) -> int:
    """MACs of golden scores as torch counts them, with attention in its plain form so that nothing hides."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        score_images(tower, images, stride=1, metrics=["preservation"], **golden)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("golden", [{"window": 2, "remove_at": 4}, {"window": 3, "remove_at": 1}])
def test_macs_of_golden_scores_are_those_that_torch_counts(inputs, images, golden, tmp_path):
    trial = resolved(golden__window=golden["window"], golden__remove_at=golden["remove_at"])
    found, tower = counted_shards(TrialContext(trial, inputs, str(tmp_path))), inputs.clip.visual
    spread = (8 - golden["window"] + 1) ** 2 * 64  # damage of windows over tokens, which is no part of the tower
    theirs = macs_that_torch_counts(tower, images, rounds=1, **golden) // len(images) - spread
    assert found.macs == 40 * theirs


@pytest.mark.slow
def test_macs_of_more_rounds_are_at_most_a_seventh_above_those_that_torch_counts(inputs, tower, images, tmp_path):
    trial = resolved(golden__rounds=4)
    ours = counted_shards(TrialContext(trial, inputs, str(tmp_path))).macs / 40
    theirs = macs_that_torch_counts(tower, images, window=2, remove_at=4, rounds=4) / len(images)
    assert theirs <= ours <= 8 / 7 * theirs


def test_prefix_and_suffix_are_the_whole(tower):
    whole = suffix_macs(tower, 65, 1) + prefix_macs(tower, 1)
    assert prefix_macs(tower, 4) + suffix_macs(tower, 65, 4) == whole
    assert prefix_macs(tower, 1) == 64 * tower.patch_embed.proj.weight[0].numel() * tower.embed_dim


def test_counts_and_bytes_are_those_of_shards_and_records_that_are_made(inputs, tmp_path):
    trial, root = resolved(), str(tmp_path / "shards")
    context = TrialContext(trial, inputs, root)
    found = counted_shards(context)
    assert (found.images_read, found.forwards) == (40, 40 * (1 + 49))
    for split, folder in context.needed_shards.values():
        make_shards(inputs.clip, split, folder, quiet=True)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))
    assert written / 1.3 < found.num_bytes < 1.3 * written
    run_trial(trial, inputs, str(tmp_path), root, "test", quiet=True)
    written = sum(path.stat().st_size for path in (tmp_path / "trials").iterdir())
    assert written / 1.5 < counted(inputs, trial).num_bytes < 1.5 * written
    assert counted_shards(context) == Work()


def test_what_trials_share_counts_once(inputs):
    one = counted(inputs, resolved())
    other_rate = counted(inputs, resolved(), resolved(pruning__keep_rate=0.5))
    other_seed = counted(inputs, resolved(), resolved(seed=1))
    # unpruned images, their tokens and those of shards, fitting, and pruned images
    assert one.forwards == 2 * 32 + 40 + 3 * 24 + 32
    assert other_rate.forwards - one.forwards == 32
    assert other_seed.forwards - one.forwards == 32 + 3 * 24
    assert other_rate.images_read == one.images_read == 32 + 40


def test_each_worker_reads_its_images(inputs):
    trials = [resolved(pruning__keep_rate=rate) for rate in (0.4, 0.5, 0.6, 0.7)]
    assert counted(inputs, *trials, workers=2).images_read == 2 * counted(inputs, *trials).images_read


def test_controls_and_oracles_count(inputs):
    plain = counted(inputs, resolved())
    controlled = counted(inputs, resolved(controls=["random", "reversed"]))
    assert controlled.forwards - plain.forwards == 2 * 16
    oracle = resolved(pruning__reducer="golden", data__n_oracle=4)
    found = counted(load_inputs(oracle.config.model, oracle.config.data), oracle)
    assert found.forwards == 2 * 32 + 16 + 4


@pytest.mark.parametrize("mode, images, texts", [("T", 0, 3 * 5 * 10), ("V", 3 * 3 * 20, 0), ("TV", 180, 150)])
def test_tuning_counts_its_steps(inputs, mode, images, texts):
    tuned = resolved(prompt={"mode": mode, "shots": 2, "epochs": 3, "batch_size": 4})
    found, plain = counted(inputs, tuned), counted(inputs, resolved())
    assert found.forwards - plain.forwards == images + texts - 32  # whose tokens no trial shares where prompts change
    assert found.macs > plain.macs


def test_a_dry_run_says_that_it_estimates_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path, SPACE, reducer="predictor", more="objectives: [{metric: ms, mode: min}]")
    before, threads = sorted(tmp_path.iterdir()), torch.get_num_threads()
    run_sweep("sweep.yaml", dry_run=True)
    said = capsys.readouterr().err
    assert "golden shards: 2 to make, 1,600 forwards of windows, " in said
    assert "trials: 2 to run, " in said and "milliseconds: 2 towers to measure, " in said
    minutes = re.search(r"in all about ([\d.]+) min with \d trials at a time on this machine: an estimate", said)
    assert 0.5 <= float(minutes[1]) < 5
    assert sorted(tmp_path.iterdir()) == before and torch.get_num_threads() == threads


def test_counting_leaves_the_pair_as_it_was(inputs):
    before, state = weight_sums(inputs.clip), torch.random.get_rng_state()
    counted(inputs, resolved(pruning__keep_rate=0.3))
    assert inputs.clip.visual.pruner is None
    assert weight_sums(inputs.clip) == before and torch.equal(torch.random.get_rng_state(), state)


def weight_sums(model: torch.nn.Module) -> list[float]:
    return [weight.detach().double().sum().item() for weight in model.parameters()]
