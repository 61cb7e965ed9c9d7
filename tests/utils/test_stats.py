"""Intervals that draw whole clusters, Holm's correction, and the spread over seeds."""

import numpy as np
import pytest

from patchrank.utils.errors import UserError
from patchrank.utils.stats import Interval, cluster_bootstrap, holm, paired_interval, spread


def clustered(generator, clusters=40, truth=0.3):
    """Values of clusters of 2 to 8 that share most of their deviation."""
    names = np.repeat(np.arange(clusters), generator.integers(2, 9, clusters))
    return truth + generator.normal(size=clusters)[names] + 0.5 * generator.normal(size=len(names)), names


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator, covered = np.random.default_rng(1), np.zeros(2)
    for _ in range(200):
        values, names = clustered(generator)
        for which, units in enumerate([names, np.arange(len(names))]):
            interval = paired_interval(values, 0, units, draws=500)
            covered[which] += interval.low <= 0.3 <= interval.high
    by_cluster, by_image = covered / 200
    assert 0.90 <= by_cluster <= 0.99
    assert by_image < 0.85  # drawing images singly promises too much


def test_a_sample_takes_whole_clusters_and_weighs_them_by_size():
    values, names = np.array([1.0, 1, 1, 5]), np.array(["b", "b", "b", "a"])
    means = cluster_bootstrap(values, names, draws=4000)
    assert set(means) == {1.0, 2.0, 5.0}  # only b, both, only a
    assert np.mean(means == 2) == pytest.approx(0.5, abs=0.05)


def test_pairs_tell_what_means_alone_do_not():
    generator = np.random.default_rng(2)
    b = generator.normal(0, 10, 400)
    a = b + generator.normal(0.2, 0.5, 400)
    assert paired_interval(a, b, np.arange(400)).low > 0
    assert not paired_interval(a, generator.permutation(b), np.arange(400)).excludes_zero


def test_equal_answers_are_no_difference():
    a = np.array([0.0, 100, 100, 0])
    assert paired_interval(a, a, np.arange(4)) == Interval(0, 0, 0, 1, 4, 4)


def test_bounds_of_zero_do_not_exclude_it():
    a = np.array([100, 100 / 3, 0] * 50)
    interval = paired_interval(a + np.tile([100 / 3, -100 / 3, 0], 50), a, np.repeat(np.arange(50), 3), draws=200)
    assert (interval.estimate, interval.low, interval.high, interval.p) == (0, 0, 0, 1)


def test_p_is_small_but_never_zero_and_agrees_with_the_interval():
    generator = np.random.default_rng(3)
    assert paired_interval(generator.normal(5, 1, 50), 0, np.arange(50), draws=999).p == pytest.approx(2 / 1000)
    for shift in (-0.5, -0.3, 0, 0.2, 0.4):
        interval = paired_interval(generator.normal(shift, 1, 60), 0, np.arange(60))
        assert interval.excludes_zero == (interval.p < 0.05)


def test_seeds_decide_the_draws():
    values, names = clustered(np.random.default_rng(4))
    one, again, other = (cluster_bootstrap(values, names, 100, seed) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any()
    assert paired_interval(values, 0, names) == paired_interval(values, 0, names)


def test_level_widens():
    values, names = clustered(np.random.default_rng(5))
    narrow, wide = (paired_interval(values, 0, names, level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_one_cluster_has_a_mean_and_no_interval():
    found = paired_interval(np.array([1.0, 2.0, 6.0]), 0, np.zeros(3))
    assert found.estimate == 3 and np.isnan([found.low, found.high, found.p]).all()
    assert (found.n, found.clusters, found.is_known, found.excludes_zero) == (3, 1, False, False)
    assert found.ends == (3, 3)
    with pytest.raises(UserError, match="at least 2 clusters, but there are 1"):
        cluster_bootstrap(np.ones(3), np.zeros(3))


def test_holm_by_hand():
    # sorted 0.005 0.01 0.03 0.04 times 4 3 2 1, each no less than the one before
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1, 1]
    assert holm([0.02]).tolist() == [0.02] and holm([]).tolist() == []


def test_spread_needs_two_seeds():
    assert spread([1, 2, 3]) == 1
    assert np.isnan(spread([1]))
