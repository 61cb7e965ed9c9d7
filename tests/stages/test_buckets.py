"""`python -m patchrank.evaluate --bucket-rates`: a keep rate for each image beside one for all."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from patchrank import evaluate
from patchrank.utils.errors import UserError

FEW = "--data digits_ink --limit 12 --batch-size 6 --locations 4 --keep-rate 0.5".split()


def mean_macs(tower, row):
    """Mean MACs of an image by the rates and shares of a row, and 128 of the map that tells difficulty."""
    with tower.restoring():
        macs = []
        for rate in row["bucket_rates"]:
            tower.set_pruning(keep_rate=rate, locations=(4,))
            macs.append(tower.macs().image)
    return np.dot(row["bucket_shares"], macs) + 128


def macs_of_a_token(tower):
    """By how much the MACs of an image differ where one token more leaves before layer 4."""
    with tower.restoring():
        tower.set_pruning(locations=(4,), drop_counts=(31,))
        more = tower.macs().image
        tower.set_pruning(drop_counts=(32,))
        return more - tower.macs().image


def test_the_row_has_buckets_beside_one_rate_at_the_same_macs(clip, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "BUCKET_IMAGES", 50)
    timed, seconds_of = [], evaluate.seconds_of

    def noting(tower, images):
        timed.append(tower.macs().image if hasattr(tower, "pruning") else "buckets")
        return seconds_of(tower, images)

    monkeypatch.setattr(evaluate, "seconds_of", noting)
    evaluate.main([*FEW, "--bucket-rates", "0.6,0.4,0.5"])
    said = capsys.readouterr()
    row = json.loads(said.out)
    assert row["bucket_rates"] == [0.4, 0.5, 0.6] and sum(row["bucket_shares"]) == pytest.approx(1)
    assert row["keep_rate"] == 0.5 and row["gmacs_bucketed"] == pytest.approx(mean_macs(clip.visual, row) / 1e9)
    for name in ("cosine", "accuracy"):
        change, low, high = row[f"{name}_change"]
        assert change == pytest.approx(row[f"{name}_bucketed"] - row[f"{name}_one_rate"], abs=1e-6)
        assert low <= change <= high
    assert row["cosine_one_rate"] == pytest.approx(row["cosine"], abs=0.01)
    assert row["images_per_second_one_rate"] > 0 and row["images_per_second_bucketed"] > 0
    assert timed == ["buckets", timed[1], timed[1], "buckets"]  # two batches, in turns
    assert abs(timed[1] - 1e9 * row["gmacs_bucketed"]) <= macs_of_a_token(clip.visual) / 2
    assert "keep rate 0.4: " in said.err and "one rate at the same MACs: " in said.err


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--task retrieval --bucket-rates 0.4,0.6", "--bucket-rates goes with --task classification"),
        ("--split adapt --bucket-rates 0.4,0.6", "12 images of split 'adapt' are among those that .*; try --split val"),
        ("--bucket-rates 0.6,0.7", "must lie on both sides of the pruning in force"),
    ],
)
def test_flags_that_make_no_buckets_are_refused(flags, says):
    with pytest.raises(UserError, match=says):
        evaluate.main([*FEW, *flags.split()])


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("locations", [(4,), (4, 8)])
def test_figures_at_equal_macs_lie_between_two_schedules_where_their_macs_do(clip, monkeypatch, locations, align):
    tower, asked = clip.visual, []

    def macs_as_figure(clip, split, **_):
        asked.append((clip.visual.drop_counts, clip.visual.macs().image))
        return SimpleNamespace(cosine={"pruned": np.full(3, asked[-1][1])}, answers={}, labels=None)

    monkeypatch.setattr(evaluate, "evaluate", macs_as_figure)
    with tower.restoring():
        tower.set_pruning(keep_rate=0.5, locations=locations, align=align)
        before, macs = tower.pruning, tower.macs().image + 100_000.0
        found, nearest = evaluate.at_macs(clip, None, macs, None, 6)
        assert tower.pruning == before
    assert found["cosine"] == pytest.approx(np.full(3, macs), rel=1e-9)
    (counts, less), (one_less, more) = asked
    assert less < macs < more and abs((macs - less) / (more - less) - 0.5) > 0.02  # a share of 0.5 could not be wrong
    assert sum(counts) - sum(one_less) == 1
    assert nearest == min(asked, key=lambda schedule: abs(schedule[1] - macs))[0]
