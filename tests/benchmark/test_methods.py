"""The lines of a table: which towers they are, that they share weights, and that their schedules can be compared."""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.open_clip_files import write_config
from timm.models.vision_transformer import VisionTransformer

from patchrank.benchmark.methods import create_base, create_methods, read_methods, timm_twin
from patchrank.benchmark.mode import Mode
from patchrank.benchmark.schedules import Asked
from patchrank.layers.reducers import REDUCERS
from patchrank.utils.errors import UserError

DIGITS = "patchrank_clip_digits"
EVERY = [name for name in REDUCERS if name != "golden"]
MERGING = [f"{name}+merge" for name in EVERY if not REDUCERS[name].merges]


def methods_of(names, base, model=DIGITS, **asked):
    return create_methods(names, base, model, Asked(**asked), Mode())


def weights_of(tower):
    return tower.blocks[3].mlp.fc1.weight.data_ptr(), tower.pos_embed.data_ptr()


@pytest.fixture(scope="module")
def base():
    return create_base(DIGITS, None, Mode(), seed=0)


@pytest.fixture(scope="module")
def of_196():
    """A small tower of 12 layers with as many patches as B/16 has."""
    return create_base(DIGITS, 112, Mode(), seed=0)


@pytest.fixture(scope="module")
def every(base):
    return {method.name: method for method in methods_of(["timm", "timm_cls", *EVERY, *MERGING], base)}


def test_timm_is_its_own_class_and_gives_what_ours_does_unpruned(base, images):
    twin = timm_twin(base)
    assert type(twin) is VisionTransformer and weights_of(twin) == weights_of(base)
    with torch.inference_mode():
        assert torch.equal(twin(images), base(images))


def test_all_towers_share_their_weights(base, every):
    assert {weights_of(method.tower) for method in every.values()} == {weights_of(base)}
    assert base.pruner is None and len({id(method.tower) for method in every.values()}) == len(every)


@pytest.mark.parametrize("name", [*EVERY, *MERGING])
def test_every_method_costs_what_the_papers_schedule_costs(every, name, images):
    method, paper = every[name], every["predictor"]
    one_token = method.macs_unpruned / 65
    assert abs(method.macs - paper.macs) <= max(0.01 * paper.macs, one_token)
    assert method.keep_rate < 1 and method.tower.cls_only and len(method.locations) == len(method.drop_counts)
    with torch.inference_mode():
        assert method.tower(images[:1]).shape == (1, 64)


def test_whole_towers_drop_nothing(every):
    timm, cls = every["timm"], every["timm_cls"]
    assert (
        (timm.keep_rate, timm.drop_counts, timm.reducer)
        == (cls.keep_rate, cls.drop_counts, cls.reducer)
        == (1.0, (), None)
    )
    assert timm.macs == timm.macs_unpruned > cls.macs and cls.tower.cls_only


def test_the_papers_schedule_of_196_patches_is_20_tokens_at_four_layers(of_196):
    plain, merging = methods_of(["predictor", "predictor+merge"], of_196)
    assert plain.drop_counts == (20, 20, 20, 20) and plain.locations == (4, 6, 8, 10)
    assert merging.macs <= plain.macs
    (one,) = methods_of(["predictor"], of_196, locations=(4,))
    assert (one.drop_counts, one.locations) == ((80,), (4,))


def test_published_methods_reduce_where_their_authors_do(of_196):
    tome, evit = methods_of(["tome", "evit"], of_196)
    assert tome.locations == tuple(range(1, 12)) and max(tome.drop_counts) - min(tome.drop_counts) <= 2
    assert evit.locations == (4, 7, 10)
    left, shares = 196, []
    for count in evit.drop_counts:
        shares.append(1 - count / left)
        left -= count
    assert max(shares) - min(shares) < 0.015  # EViT keeps the same share at each


def test_keep_rates_hold_for_every_method_and_pairs_get_more_places(base):
    found = methods_of(["timm", "predictor", "tome"], base, keep_rates=(0.8, 0.4), locations=(4,))
    assert [(each.name, each.keep_rate_asked) for each in found] == [
        ("timm", None),
        *[("predictor", 0.8), ("predictor", 0.4)],
        *[("tome", 0.8), ("tome", 0.4)],
    ]
    assert [each.locations for each in found] == [(), (4,), (4,), (4,), (4, 5)]
    assert [sum(each.drop_counts) for each in found] == [0, 13, 38, 13, 38]
    assert [each.keep_rate for each in found] == [1.0, 0.7969, 0.4062, 0.7969, 0.4062]


def test_the_share_that_is_left_is_told_where_lengths_are_rounded(base):
    _, high, low = methods_of(["timm", "predictor"], base, keep_rates=(0.8, 0.79), align=8)
    assert high.keep_rate == low.keep_rate == round(1 - sum(high.drop_counts) / 64, 4) != 0.8
    assert (high.keep_rate_asked, low.keep_rate_asked) == (0.8, 0.79) and high.label != low.label


def test_counts_and_budgets_are_kept_to(base):
    plain, evit = methods_of(["predictor", "evit"], base, drop_counts=(30,), locations=(4,))
    assert (plain.drop_counts, plain.locations, evit.locations) == ((30,), (4,), (4,))
    assert abs(evit.macs - plain.macs) < plain.macs_unpruned / 65
    for method in methods_of(["predictor", "tome"], base, budget=0.5):
        assert 0.48 < method.macs / method.macs_unpruned <= 0.5


def test_sequences_are_as_long_as_hardware_likes_where_that_is_asked_for(of_196):
    for method in methods_of(["predictor", "evit", "tome"], of_196, align=8):
        left = 197
        for count in method.drop_counts:
            left -= count
            assert left % 8 == 0


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"keep_rates": (0.5,), "budget": 0.5}, "--keep-rates and --budget exclude each other"),
        ({"locations": (4, 13)}, "locations must be layer numbers from 1 to the tower's depth 12"),
        ({"drop_counts": (20, 20)}, "drop_counts must be one count"),
        ({"budget": 0.01}, "budget 0.01 cannot be kept"),
    ],
)
def test_impossible_schedules_are_told(base, asked, message):
    with pytest.raises(UserError, match=message):
        methods_of(["predictor", "tome"], base, **asked)


@pytest.mark.parametrize(
    "text, message",
    [
        ("timm,predictr", "method 'predictr' does not exist; did you mean 'predictor'"),
        ("evit,evit", "'evit' stands there 2 times"),
        ("golden", "'golden' ranks by scores from outside, .* try prior"),
        ("tome+merge", r"tome merges by a rule of its own, and \+merge is for rankings; try tome"),
        ("timm+merge", r"timm drops nothing, and \+merge is for rankings"),
    ],
)
def test_names_that_say_nothing_are_told(text, message):
    with pytest.raises(UserError, match=message):
        read_methods(text)


def test_timm_is_always_the_first():
    assert read_methods("evit, timm_cls") == ["timm", "evit", "timm_cls"] == read_methods("evit,timm,timm_cls")
    assert read_methods("") == ["timm"]


def test_open_clips_own_tower(tmp_path, monkeypatch, base):
    model = write_config(tmp_path / "toy.json")
    toy = create_base(model, None, Mode(), seed=0)
    timm, theirs = methods_of(["timm", "open_clip"], toy, model)
    assert type(theirs.tower).__module__ == "open_clip.transformer" and theirs.macs == timm.macs
    with torch.inference_mode():
        assert theirs.tower(torch.randn(2, 3, 32, 32)).shape == timm.tower(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    with pytest.raises(UserError, match="open_clip has no tower like patchrank_clip_digits"):
        methods_of(["open_clip"], base)
    monkeypatch.setattr(
        "patchrank.models.open_clip.by_name.create_model", lambda *_: SimpleNamespace(visual=SimpleNamespace(trunk=1))
    )
    with pytest.raises(UserError, match="no tower of its own like this .*: its tower there is timm's"):
        methods_of(["open_clip"], toy, model)


def test_where_open_clip_is_missing_one_line_says_so(base, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("patchrank.models.open_clip.by_name")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match="needs the package open_clip .*; try pip install open_clip_torch, or without"):
        methods_of(["open_clip"], base)
