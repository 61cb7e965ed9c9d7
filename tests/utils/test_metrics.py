"""Matching rate, Kendall and NDCG of rankings."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from patchrank.utils.metrics import kendall, matching_each, matching_rate, ndcg, top_k


@pytest.fixture
def scores():
    generator = np.random.default_rng(0)
    golden = generator.normal(size=(5, 49))
    return golden + generator.normal(size=golden.shape), golden


def test_matching_each_averages_to_the_rate(scores):
    each = matching_each(*scores)
    assert each.shape == (5,)
    assert each.mean() == pytest.approx(matching_rate(*scores), abs=1e-12)
    assert each[0] == matching_rate(scores[0][:1], scores[1][:1])


def test_matching_each_by_hand():
    golden = np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    assert matching_each(np.array([4.0, 1, 3, 2]), golden, k=2).tolist() == [50, 50]
    assert matching_each(np.array([4.0, 3, 2, 1]), golden, k=1).tolist() == [100, 0]


def test_kendall_is_scipys(scores):
    predicted, golden = scores[0].round(), scores[1]  # rounded: with ties
    expected = [kendalltau(ours, right, variant="b").statistic for ours, right in zip(predicted, golden)]
    np.testing.assert_allclose(kendall(predicted, golden), expected, atol=1e-12)


def test_kendall_counts_pairs():
    golden = np.array([[3.0, 2, 1], [1, 2, 3], [0, 0, 0]])  # the last orders nothing
    np.testing.assert_allclose(kendall(np.array([3.0, 1, 2]), golden), [1 / 3, -1 / 3, 0], atol=1e-12)


def test_ndcg_by_hand():
    golden = np.array([[0.1, 9, 5, 7]])  # gains 0 3 1 2
    ours = np.array([[9.0, 8, 7, 6]])
    ideal = 3 + 2 / np.log2(3)
    np.testing.assert_allclose(ndcg(ours, golden, k=2), [(0 + 3 / np.log2(3)) / ideal], atol=1e-12)


def test_ndcg_is_one_for_the_golden_order_and_falls_from_there(scores):
    predicted, golden = scores
    np.testing.assert_allclose(ndcg(np.exp(golden), golden), 1, atol=1e-12)
    assert (ndcg(golden, golden) > ndcg(predicted, golden)).all()
    assert (ndcg(predicted, golden) > ndcg(-golden, golden)).all()
    np.testing.assert_array_equal(ndcg(predicted, golden), ndcg(predicted, golden, top_k(49)))


@pytest.mark.parametrize("figure", [matching_each, kendall, ndcg])
def test_one_ranking_may_serve_all_images(figure, scores):
    predicted, golden = scores
    np.testing.assert_array_equal(figure(predicted[0], golden), figure(np.stack([predicted[0]] * 5), golden))
