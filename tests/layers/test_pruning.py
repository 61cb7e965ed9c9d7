import pytest
import torch

from patchrank.layers import pruning, schedule
from patchrank.utils.errors import UserError


@pytest.mark.parametrize(
    "num_tokens, keep_rate, kept",
    [(196, 0.6, 118), (64, 0.6, 38), (64, 1.0, 64), (64, 0.001, 1), (5, 0.5, 3)],
)
def test_num_kept_rounds_halves_up_and_leaves_one(num_tokens, keep_rate, kept):
    assert schedule.num_kept(num_tokens, keep_rate) == kept


def test_removals_are_equal_and_earlier_locations_take_the_rest():
    assert schedule.drop_schedule(196, 0.6, (4, 6, 8, 10)) == (20, 20, 19, 19)
    assert schedule.drop_schedule(196, 0.6, (4, 6, 8, 10), drop_counts=(20, 20, 20, 20)) == (20, 20, 20, 20)
    assert schedule.drop_schedule(64, 1.0, (4,)) == (0,)


def half(num_tokens):
    """What a matching in pairs can let go at once."""
    return num_tokens // 2


@pytest.mark.parametrize(
    "num_tokens, counts, align, leading, lengths",
    [
        (64, (7, 7, 6, 6), 8, 1, [56, 48, 48, 40]),  # 58, 51, 45, 39 to the nearest
        (64, (5,), 8, 1, [64]),  # 60 is as near to 56, and the longer one is taken
        (196, (20, 20, 20, 20), 16, 1, [176, 160, 144, 112]),
        (64, (31, 30), 16, 1, [48, 32]),  # 34 is nearer to 32, but more than half would leave; 4 likewise
        (63, (1, 1), 8, 1, [56, 56]),  # the whole sequence fits, but one leaves at the first location
        (64, (7, 7), 8, 5, [64, 56]),  # with four prompts: 62, 55
        (64, (0, 0), 8, 1, [65, 65]),
    ],
)
def test_lengths_are_the_nearest_multiples(num_tokens, counts, align, leading, lengths):
    found = schedule.aligned(num_tokens, counts, align, leading, half)
    assert [leading + num_tokens - sum(found[: place + 1]) for place in range(len(found))] == lengths
    assert schedule.aligned(num_tokens, counts, 1, leading, half) == counts


@pytest.mark.parametrize("align, leading", [(66, 1), (100, 1), (41, 16)])
def test_multiples_that_cannot_be_reached_are_refused(align, leading):
    with pytest.raises(UserError, match=f"align {align} cannot be kept: of {leading + 64} tokens .* smaller align"):
        schedule.aligned(64, (20, 10), align, leading, half)


@pytest.mark.parametrize("keep_rate", [0, -0.1, 1.01, float("nan")])
def test_keep_rate_outside_its_range_is_refused(keep_rate):
    with pytest.raises(UserError, match="keep_rate must lie in"):
        schedule.num_kept(64, keep_rate)


@pytest.mark.parametrize("locations", [(), (0,), (13,), (4, 4), (6, 4), (4.0,), (True,)])
def test_locations_must_be_increasing_layers(locations):
    with pytest.raises(UserError, match="locations must"):
        schedule.check_locations(locations, 12)


@pytest.mark.parametrize("depth", [1, 2, 4, 6, 12, 27])
def test_locations_that_a_tower_lacks_are_answered_with_some_that_it_has(depth):
    with pytest.raises(UserError, match=r"; try \(.*\), as a flag --locations [\d ]+$") as caught:
        schedule.check_locations((4, 6, 8, 100), depth)
    found = [int(layer) for layer in str(caught.value).rpartition("--locations ")[2].split()]
    assert schedule.check_locations(found, depth) == tuple(found)


@pytest.mark.parametrize("counts", [(1,), (-1, 1), (32, 32), (1.5, 1)])
def test_drop_counts_must_fit(counts):
    with pytest.raises(UserError, match="drop_counts must"):
        schedule.drop_schedule(64, 0.5, (1, 2), counts)


def test_ties_keep_the_lower_index():
    assert pruning.rank(torch.tensor([[1.0, 2.0, 1.0, 2.0]])).tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize("count", [0, 3])
def test_rows_are_taken_of_each_image_by_itself(count):
    x = torch.randn(2, 7, 5)[:, 2:]  # a slice, as patches of a sequence are
    index = torch.stack([torch.randperm(5)[:count] for _ in range(2)])
    expected = torch.stack([image[places] for image, places in zip(x, index)])
    assert torch.equal(pruning.take(x, index), expected)
    assert torch.equal(pruning.take(x[..., 0], index), expected[..., 0])


def test_windows_cover_the_grid():
    assert pruning.windows((14, 14), 2).shape == (169, 4)
    assert pruning.windows((14, 14), 2, stride=2).shape == (49, 4)
    assert pruning.windows((3, 3), 2).tolist()[0] == [0, 1, 3, 4]


@pytest.mark.parametrize("grid, window, stride", [((8, 8), 9, 1), ((8, 8), 0, 1), ((8, 8), 3, 3), ((8, 8), 2, 0)])
def test_windows_that_do_not_fit_or_leave_gaps_are_refused(grid, window, stride):
    with pytest.raises(UserError):
        pruning.windows(grid, window, stride)


def test_window_mean_divides_by_the_windows_that_cover_a_token():
    squares = pruning.windows((3, 3), 2)
    mean = pruning.window_mean(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), squares, 9)
    assert mean.tolist() == [[1.0, 1.5, 2.0, 2.0, 2.5, 3.0, 3.0, 3.5, 4.0]]


def test_importance_is_z_scored_damage_and_zero_where_constant():
    damage = torch.rand(2, 64, dtype=torch.float64) * 1e-7
    g = pruning.z_scored(damage)
    assert torch.allclose(g.mean(-1), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(g.std(-1, correction=0), torch.ones(2, dtype=torch.float64))
    assert torch.equal(g.argsort(), damage.argsort())
    noisy_constant = torch.full((1, 64), 0.3, dtype=torch.float64) + torch.rand(1, 64, dtype=torch.float64) * 1e-14
    assert pruning.z_scored(noisy_constant).abs().max() == 0


def test_scatter_puts_tokens_back():
    tokens, index = torch.randn(1, 2, 3), torch.tensor([[3, 0]])
    grid = pruning.scatter_to_grid(tokens, index, 4)
    assert torch.equal(grid[0, 3], tokens[0, 0]) and torch.equal(grid[0, 0], tokens[0, 1])
    assert grid[0, 1:3].abs().sum() == 0
