"""`python -m patchrank.evaluate --bucket-rates`: a keep rate for each image beside one for all."""

import json

import pytest

from patchrank import evaluate
from patchrank.utils.errors import UserError

FEW = "--data digits_ink --limit 12 --batch-size 6 --locations 4 --keep-rate 0.5".split()


def test_the_row_has_buckets_beside_one_rate_at_the_same_macs(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "BUCKET_IMAGES", 50)
    evaluate.main([*FEW, "--bucket-rates", "0.6,0.4,0.5"])
    said = capsys.readouterr()
    row = json.loads(said.out)
    assert row["bucket_rates"] == [0.4, 0.5, 0.6] and sum(row["bucket_shares"]) == pytest.approx(1)
    assert row["keep_rate"] == 0.5 and row["gmacs_bucketed"] == pytest.approx(row["gmacs"], rel=0.15)
    for name in ("cosine", "accuracy"):
        change, low, high = row[f"{name}_change"]
        assert change == pytest.approx(row[f"{name}_bucketed"] - row[f"{name}_one_rate"], abs=1e-6)
        assert low <= change <= high
    assert row["cosine_one_rate"] == pytest.approx(row["cosine"], abs=0.01)
    assert row["images_per_second"] > 0 and row["images_per_second_bucketed"] > 0
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
