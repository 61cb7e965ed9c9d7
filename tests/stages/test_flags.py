"""Flags that are made from schemas: what they take, what they refuse, what they are read back as."""

import importlib

import pytest

from patchrank.cli.config_flags import add_config_flags, read_config
from patchrank.cli.flags import add_pruning_flags, pruning_from
from patchrank.cli.summary import pruning_title
from patchrank.config import GoldenConfig, ModelConfig, PromptConfig, PruningConfig, TrialConfig
from patchrank.utils.command import create_parser
from patchrank.utils.errors import UserError


@pytest.fixture
def parser():
    return create_parser("golden", "Tests flags.")


@pytest.mark.parametrize(
    "stage, flags, message",
    [
        ("evaluate", "--keep-rate 2", "--keep-rate: should be a number above 0 and at most 1, but is '2'"),
        ("evaluate", "--keep-rate nan", "--keep-rate: should be a number above 0 and at most 1, but is 'nan'"),
        ("evaluate", "--keep-rate half", "--keep-rate: should be a number above 0 and at most 1, but is 'half'"),
        ("evaluate", "--locations 4 x", "--locations: should be a valid integer, but is 'x'"),
        ("evaluate", "--locations", "--locations: expected at least one argument"),
        ("evaluate", "--bucket-rates 0.4,x", "--bucket-rates: should be a number above 0 and at most 1, but is 'x'"),
        ("evaluate", "--controls shuffled", "--controls: invalid choice: 'shuffled'"),
        ("evaluate", "--templates openai8", "--templates: invalid choice: 'openai8'"),
        ("evaluate", "--keep 0.5 --foo", "unrecognized arguments: --foo"),
        ("evaluate", "--img-size 0", "--img-size: should be greater than or equal to 1, but is '0'"),
        ("benchmark", "--img-size 96.5", "--img-size: should be a valid integer, but is '96.5'"),
        ("evaluate", "--budget 1.5", "--budget: should be a number above 0 and at most 1, but is '1.5'"),
        ("benchmark", "--drop-counts", "--drop-counts: expected at least one argument"),
        ("retrieval", "--drop-counts 3 x", "--drop-counts: should be a valid integer, but is 'x'"),
        ("prompt", "--metric values", "--metric: invalid choice: 'values'"),
        ("visualize", "--protection -1", "--protection: should be greater than or equal to 0, but is '-1'"),
        ("evaluate", "--drop-share 2", "--drop-share: should be less than or equal to 1, but is '2'"),
        ("fit", "--dim 0", "--dim: should be greater than or equal to 1, but is '0'"),
        ("fit", "--lr inf", "--lr: should be a finite number, but is 'inf'"),
        ("fit", "--head max", "--head: invalid choice: 'max'"),
        ("fit", "", "the following arguments are required: --shards, --val-shards"),
        ("golden", "--remove-at first", "--remove-at: should be a valid integer, but is 'first'"),
        ("evaluate", f"--seed {2**32}", "--seed: should be less than 4294967296, but is '4294967296'"),
        ("fit", "--seed -1", "--seed: should be greater than or equal to 0, but is '-1'"),
        ("golden", f"--window {10**40}", "--window: should be a number of at most 63 bits"),
        ("benchmark", "--threads 5000", "--threads: should be less than or equal to 4096, but is '5000'"),
        ("benchmark", "--repeats 2", "--repeats: should be greater than or equal to 3, but is '2'"),
        ("prompt", "--mode VT", "--mode: invalid choice: 'VT'"),
        ("prompt", "--images -3", "--images: should be greater than or equal to 1, but is '-3'"),
        ("tune", "x --wait long", "--wait: invalid float value: 'long'"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_that_names_the_flag(stage, flags, message, capsys):
    module = importlib.import_module(f"patchrank.{stage}")
    module = importlib.import_module(f"patchrank.{stage}.__main__") if hasattr(module, "__path__") else module
    with pytest.raises(SystemExit) as ended:
        module.main(flags.split())
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"error: {message}") and told.endswith("; try --help\n")
    assert len(told.splitlines()) == 1


def test_flags_that_do_not_fit_each_other_are_refused(parser):
    add_config_flags(parser, PromptConfig, *PromptConfig.model_fields)
    with pytest.raises(UserError, match="flags: loss 'distill' learns visual tokens alone, so mode must be 'V'"):
        read_config(parser.parse_args(["--loss", "distill"]), PromptConfig)
    add_config_flags(parser, PruningConfig, *PruningConfig.model_fields)
    with pytest.raises(UserError, match="flags: align 8 rounds counts, but drop_counts 20, 20 say .*; try align 1"):
        read_config(parser.parse_args("--align 8 --drop-counts 20 20".split()), PruningConfig)


def test_without_flags_a_configuration_is_the_schemas_own(parser):
    add_config_flags(parser, PromptConfig, *PromptConfig.model_fields)
    add_config_flags(parser, PruningConfig, "keep_rate", "locations")
    args = parser.parse_args([])
    assert read_config(args, PromptConfig) == PromptConfig() and read_config(args, PruningConfig) == PruningConfig()


def test_flags_are_read_back_as_a_configuration(parser):
    add_config_flags(parser, PruningConfig, *PruningConfig.model_fields)
    add_config_flags(parser, PromptConfig, "norm_gains", "augment", "words", "lr")
    add_config_flags(parser, ModelConfig, "checkpoint", "img_size", model="name")
    add_config_flags(parser, TrialConfig, "controls", "seed")
    text = "--keep-rate 0.5 --locations 2 5 --norm-gains --no-augment --words 12 --lr 1e-3 --model a --img-size 96 "
    text += "--controls random --drop-counts 3 2 --budget 0.65 --taper 0.5 --metric keys --protection 0 --drop-share 1 "
    text += "--leftovers merge --reducer tome"
    args = parser.parse_args(text.split())
    pruning = {"drop_counts": (3, 2), "budget": 0.65, "taper": 0.5, "metric": "keys", "protection": 0.0}
    pruning |= {"drop_share": 1.0, "leftovers": "merge", "reducer": "tome", "keep_rate": 0.5, "locations": (2, 5)}
    assert read_config(args, PruningConfig) == PruningConfig(**pruning)
    assert read_config(args, PromptConfig) == PromptConfig(norm_gains=True, augment=False, words="12", lr=0.001)
    assert read_config(args, ModelConfig) == ModelConfig(name="a", img_size=96)
    assert read_config(args, TrialConfig) == TrialConfig(controls=("random",))


SAME = {"keep_rate": 0.6, "locations": [4, 6, 8, 10], "reducer": "predictor", "leftovers": "drop"}


@pytest.mark.parametrize(
    "flags, row, title",
    [
        ("", SAME | {"keep_rate": 1.0}, "nothing pruned"),
        ("--keep-rate 0.6", SAME, "60 % of patches kept by predictor at layers 4, 6, 8, 10"),
        (
            "--keep-rate 0.6 --leftovers drop --metric features",
            SAME,
            "60 % of patches kept by predictor at layers 4, 6,",
        ),
        (
            "--keep-rate 0.6 --leftovers merge --metric keys",
            SAME | {"leftovers": "merge", "metric": "keys"},
            "60 % of patches kept by predictor at layers 4, 6, 8, 10, the others merged",
        ),
        (
            "--budget 0.65 --reducer tome --locations 4 5",
            {"keep_rate": 1.0, "locations": [4, 5], "reducer": "tome", "leftovers": None, "budget": 0.65},
            "at most 65 % of MACs, patches merged by tome at layers 4, 5",
        ),
        (
            "--keep-rate 0.6 --drop-counts 9 0 0 1",
            SAME | {"drop_counts": [9, 0, 0, 1]},
            "9, 0, 0, 1 patches dropped by predictor at layers 4, 6, 8, 10",
        ),
        ("--keep-rate 0.6 --locations 2", SAME | {"locations": [2]}, "60 % of patches kept by predictor at layer 2"),
        ("--keep-rate 0.6 --align 8", SAME | {"align": 8}, "60 % of patches kept by predictor at layers 4, 6, 8, 10"),
        ("--keep-rate 0.6 --align 1", SAME, "60 % of patches kept by predictor at layers 4, 6, 8, 10"),
        ("--keep-rate 0.6 --drop-counts 0 0 0 0", SAME | {"drop_counts": [0] * 4}, "nothing pruned"),
    ],
)
def test_rows_and_titles_say_what_leaves_and_how(parser, flags, row, title):
    """Rows state settings that are newer only where they are not at their default."""
    add_pruning_flags(parser)
    parser.set_defaults(model="m")
    args = parser.parse_args(flags.split())
    assert pruning_from(args) == row and list(pruning_from(args))[:4] == list(SAME)
    assert pruning_title(args, "on digits/val").startswith(f"m on digits/val: {title}")


def test_help_has_the_description_and_the_default_of_a_field(parser, capsys):
    add_config_flags(parser, GoldenConfig, "window", "metric")
    add_config_flags(parser, PruningConfig, "keep_rate", "locations", "drop_counts")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and said.startswith("usage: python -m patchrank.golden")
    assert "--window WINDOW golden scores: side of the removed square, in tokens (default: 2)" in said
    assert "--metric {label,confidence,preservation}" in said and "(default: preservation)" in said
    assert "(default: 1)" in said and "(default: 4 6 8 10)" in said and "None" not in said


READ = [
    "--reducer random --leftovers merge --metric keys --drop-share 0.5",
    "--reducer diffrate --drop-share 0.5",
    "--reducer attention_merge --metric keys --protection 0.5",
    "--reducer tome --metric features --drop-share 0",  # both at their default
    "--reducer rank_merge --predictor p.safetensors",
]


@pytest.mark.parametrize("flags", READ)
def test_settings_are_taken_where_they_are_read(parser, flags):
    add_pruning_flags(parser)
    assert pruning_from(parser.parse_args(flags.split()))["reducer"] == flags.split()[1]


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--reducer tome --protection 0.5", "protection 0.5 says nothing to tome; .*: attention_merge, .*rank_merge$"),
        ("--reducer random --drop-share 0.5", "drop_share 0.5 says.* diffrate, or a ranking with leftovers 'merge'$"),
        ("--reducer random --leftovers merge --protection 0", "protection 0.0 says nothing to random"),
        ("--reducer evit --metric keys", "metric 'keys' says nothing to evit"),
        ("--reducer attention_merge --drop-share 0.1", "drop_share 0.1 says nothing"),
        (
            "--reducer tome --predictor p.safetensors",
            "--predictor p.safetensors: reducer 'tome' reads none; leave it out",
        ),
    ],
)
def test_settings_that_the_reducer_does_not_read_are_refused(parser, flags, told):
    """On a live tower they may wait for the reducer that reads them; flags say all at once."""
    add_pruning_flags(parser)
    with pytest.raises(UserError, match=told):
        pruning_from(parser.parse_args(["--keep-rate", "0.5", *flags.split()]))
