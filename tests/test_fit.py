import numpy as np
import pytest
import torch

from patchrank.errors import UserError
from patchrank.fit import Ranked, fit_predictor, matching
from patchrank.layers.predictors import create_predictor, load_predictor, save_predictor
from patchrank.metrics import matching_rate, position_prior, top_k, top_mask


@pytest.fixture
def ranked():
    """Images whose golden ranking is written in one channel of their tokens, at random places."""
    rng = torch.Generator().manual_seed(0)
    patches = torch.randn(256, 16, 8, generator=rng)
    return Ranked(torch.zeros(256, 8), patches, patches[..., 3] * 1.0)


def split(data: Ranked, n: int) -> tuple[Ranked, Ranked]:
    return Ranked(*(part[:n] for part in data)), Ranked(*(part[n:] for part in data))


def test_a_predictor_learns_content_and_beats_prior_and_chance(ranked):
    train, val = split(ranked, 192)
    predictor = fit_predictor(train, (4, 4), dim=8, epochs=200, quiet=True)
    found = matching(predictor, position_prior(train.golden.numpy()), val)
    assert found["matching_chance"] == 50.0
    assert found["matching_prior"] < 65 < 85 < found["matching_rate"]


def test_a_seed_gives_the_same_predictor_twice_and_leaves_the_global_one_alone(ranked):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = fit_predictor(ranked, (4, 4), dim=8, epochs=2, seed=1, quiet=True).state_dict()
    assert torch.equal(torch.rand(3), expected)
    two = fit_predictor(ranked, (4, 4), dim=8, epochs=2, seed=1, quiet=True).state_dict()
    other = fit_predictor(ranked, (4, 4), dim=8, epochs=2, seed=2, quiet=True).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("settings", [{"dim": 8}, {"dim": 4}, {"dim": 8, "head": "mean"}])
def test_mix_mlp_counts_its_macs(settings):
    from torch.utils.flop_counter import FlopCounterMode

    predictor = create_predictor("mix_mlp", 8, (4, 4), **settings)
    with FlopCounterMode(display=False) as counter:
        assert predictor(torch.zeros(2, 8), torch.randn(2, 16, 8)).shape == (2, 16)
    assert counter.get_total_flops() // 2 == 2 * predictor.num_macs()


def test_files_give_back_what_was_saved(tmp_path):
    predictor = create_predictor("mix_mlp", 8, (4, 4), dim=4)
    about = {"name": "mix_mlp", "kwargs": {"dim": 4}, "grid": [4, 4], "embed_dim": 8, "location": 4}
    about |= {"metric": "preservation", "model": {"name": "m", "sha256": "0"}}
    save_predictor(predictor, tmp_path / "p.safetensors", about)
    back, said = load_predictor(tmp_path / "p.safetensors")
    x = torch.zeros(2, 8), torch.randn(2, 16, 8)
    assert torch.equal(back(*x), predictor.eval()(*x))
    assert said["location"] == 4 and said["kind"] == "predictor"
    save_predictor(predictor, tmp_path / "q.safetensors", {"name": "mix_mlp"})
    with pytest.raises(UserError, match="its metadata lacks kwargs, grid, embed_dim, location, metric, model"):
        load_predictor(tmp_path / "q.safetensors")


def test_unknown_names_are_answered_with_near_ones(ranked):
    with pytest.raises(UserError, match="did you mean 'mix_mlp'"):
        create_predictor("mixmlp", 8, (4, 4))
    with pytest.raises(UserError, match="head of mix_mlp must be"):
        create_predictor("mix_mlp", 8, (4, 4), head="max")
    with pytest.raises(UserError, match="did you mean 'bce'"):
        fit_predictor(ranked, (4, 4), loss="bec", quiet=True)


def test_matching_rate():
    golden = np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    assert matching_rate(golden, golden, k=2) == 100
    assert matching_rate(-golden, golden, k=2) == 0
    assert matching_rate(np.array([9.0, 8, 0, 0]), golden, k=2) == 50
    assert (top_k(196), top_k(64)) == (100, 33)
    assert top_mask(np.zeros((1, 4)), 2).tolist() == [[True, True, False, False]]
