"""`python -m patchrank.fit`: shards of one task or several in, a predictor file and one JSON line out."""

import json

import pytest

import patchrank
from patchrank.data.dataset_factory import load_split
from patchrank.evaluate import shard_matching
from patchrank.fit import main
from patchrank.golden.make_shards import make_shards, shard_folder
from patchrank.layers.predictors import load_predictor
from patchrank.utils.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    clip, root = patchrank.create_clip("patchrank_clip_digits"), str(tmp_path_factory.mktemp("shards"))

    def make(task, split, limit):
        images = load_split(task, split, limit)
        return make_shards(clip, images, shard_folder(clip, images, root, window=2, stride=2, remove_at=4), quiet=True)

    return {
        "adapt": make("digits", "adapt", 8),
        "ink": make("digits_ink", "adapt", 8),
        "fewer": make("digits", "adapt", 4),
        "val": make("digits", "val", 8),
    }


def fit(shards, out, *train, val="val", **flags):
    argv = ["--shards", *(shards[name] for name in train), "--val-shards", shards[val], "--out", str(out)]
    main(argv + [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))])


@pytest.mark.parametrize("name", ["mix_mlp", "mlp", "transformer", "prior"])
def test_every_predictor_comes_out_as_a_file_that_a_model_ranks_by(shards, tmp_path, capsys, name):
    out = tmp_path / "p.safetensors"
    fit(shards, out, "adapt", "ink", predictor_name=name, epochs=2)
    said, told = capsys.readouterr()
    said = json.loads(said)
    assert {"matching_rate", "matching_prior", "matching_chance", "kendall", "ndcg", "seconds"} == said.keys()
    assert f"{name} fitted to 16 images, measured on 8 images of digits/val\n" in told and "by chance" in told
    assert load_predictor(out)[1]["name"] == name
    reducer = "prior" if name == "prior" else "predictor"
    clip = patchrank.create_clip("patchrank_clip_digits", keep_rate=0.5, reducer=reducer, predictor_path=out)
    assert clip.visual.pruner.reducer.about["location"] == 4


def test_pooling_changes_what_is_learnt(shards, tmp_path):
    import torch

    fit(shards, tmp_path / "one", "adapt", predictor_name="prior")
    fit(shards, tmp_path / "both", "adapt", "ink", predictor_name="prior")
    one, both = (load_predictor(tmp_path / name)[0].scores for name in ("one", "both"))
    assert not torch.equal(one, both)


def test_what_cannot_be_measured_or_learnt_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match="of digits/adapt, as --shards"):
        fit(shards, tmp_path / "p", "ink", "adapt", val="fewer")
    with pytest.raises(UserError, match="class token alone"):
        fit(shards, tmp_path / "p", "adapt", predictor_name="mlp", location=1)
    with pytest.raises(UserError, match="head of mlp must be 'linear'"):
        fit(shards, tmp_path / "p", "adapt", predictor_name="mlp", head="mean")
    assert not (tmp_path / "p").exists()


def test_a_guided_matching_has_its_predictors_matching_rate(shards):
    """And reducers without a predictor are told that they have none."""
    clip = patchrank.create_clip("patchrank_clip_digits", keep_rate=0.6)
    expected = shard_matching(clip, shards["val"])
    clip.visual.set_pruning(reducer="guided_merge")
    assert shard_matching(clip, shards["val"]) == expected and "matching_rate" in expected
    for reducer in ("tome", "center"):
        clip.visual.set_pruning(reducer=reducer)
        with pytest.raises(UserError, match="a matching rate needs pruning by reducer 'predictor', or another"):
            shard_matching(clip, shards["val"])
