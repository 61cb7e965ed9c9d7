import numpy as np
import pytest
import torch

from patchrank.fit import fit_predictor
from patchrank.golden.agreement import matching, prior_of, rank_quality
from patchrank.golden.dataset import Ranked, pooled
from patchrank.layers.predictors import create_predictor, load_predictor, save_predictor
from patchrank.utils.errors import UserError
from patchrank.utils.metrics import matching_rate, top_k, top_mask


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
    quality = rank_quality(predictor, prior_of(train), val)
    found = matching(quality, 16)
    assert all(len(values) == 64 for values in quality.values())
    assert found["kendall"] > 0.5 and found["ndcg"] > 0.9
    assert found["matching_chance"] == 50.0
    assert found["matching_prior"] < 65 < 85 < found["matching_rate"]


@pytest.mark.parametrize("name", ["mlp", "transformer", "mix_mlp"])
def test_every_predictor_is_trained_by_every_loss(ranked, name):
    train, val = split(ranked, 192)
    train, val = (Ranked(part.golden[:, :8], *part[1:]) for part in (train, val))  # half of it is in the class token
    for loss in ("bce", "listwise"):
        predictor = fit_predictor(train, (4, 4), name=name, loss=loss, dim=8, epochs=60, lr=0.003, quiet=True)
        rate = matching(rank_quality(predictor, prior_of(train), val), 16)["matching_rate"]
        assert rate > (60 if name == "mlp" else 70)


def test_eq8_warns_and_is_minimised_by_high_scores_for_all(ranked):
    from patchrank.fit import LOSSES

    golden = torch.randn(4, 16)
    losses = [LOSSES["eq8"](torch.full((4, 16), height), golden) for height in (0.0, 2.0, 10.0)]
    assert losses[0] > losses[1] > losses[2] > 0
    two_sided = [LOSSES["bce"](torch.full((4, 16), height), golden) for height in (0.0, 2.0, 10.0)]
    assert two_sided[0] < two_sided[1] < two_sided[2]
    with pytest.warns(UserWarning, match="eq8 is one-sided"):
        fit_predictor(ranked, (4, 4), loss="eq8", dim=8, epochs=1, quiet=True)


def test_the_listwise_loss_is_least_at_the_golden_scores():
    from patchrank.fit import LOSSES

    golden = torch.randn(4, 16)
    best = LOSSES["listwise"](golden, golden)
    assert all(LOSSES["listwise"](golden + 0.3 * torch.randn(4, 16), golden) > best for _ in range(5))
    assert LOSSES["listwise"](golden + 7, golden) == pytest.approx(best.item(), abs=1e-5)  # order counts, not height


def test_the_prior_is_fitted_without_training(ranked):
    prior = fit_predictor(ranked, (4, 4), name="prior", quiet=True)
    assert torch.equal(prior(ranked.cls, ranked.patches)[3], ranked.golden.mean(0))


def test_pooling_puts_images_of_several_tasks_together(ranked):
    one, two = split(ranked, 100)
    assert all(torch.equal(a, b) for a, b in zip(pooled([one, two]), ranked))
    assert pooled([one]) is one


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
