"""The closed-form repair against NumPy's least squares, and the choice of its ridge."""

import numpy as np
import pytest
import torch
from torch import nn

from patchrank.layers.repair import check_head, drift, fit_projection, solve
from patchrank.utils.errors import UserError


def problem(n=80, width=12, out=7, noise=0.1):
    """Inputs, targets, and a projection that is not quite the right one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64) + 0.5
    weight, bias = torch.randn(out, width, generator=generator).double(), torch.randn(out, generator=generator).double()
    right = weight + 0.3 * torch.randn(out, width, generator=generator, dtype=torch.float64)
    targets = x @ right.T + 1 + noise * torch.randn(n, out, generator=generator, dtype=torch.float64)
    return x, targets, weight, bias


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 50.0])
def test_the_solution_is_numpys_least_squares(ridge):
    x, targets, weight, bias = problem()
    n, width = x.shape
    ones = np.concatenate([x.numpy(), np.ones((n, 1))], axis=1)
    own = np.concatenate([weight.numpy(), bias.numpy()[:, None]], axis=1)
    pull = np.sqrt(ridge * n)  # as rows below: pull |P' - [P; b]|, squared and summed
    rows = np.concatenate([ones, pull * np.eye(width + 1)])
    wanted = np.concatenate([targets.numpy(), pull * own.T])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    found = solve(x, targets, weight, bias, ridge)
    assert np.allclose(found[0], expected[:, :-1], atol=1e-10) and np.allclose(found[1], expected[:, -1], atol=1e-10)


def test_a_large_ridge_gives_the_old_projection_back():
    x, targets, weight, bias = problem()
    found = solve(x, targets, weight, bias, 1e12)
    assert torch.allclose(found[0], weight, atol=1e-9) and torch.allclose(found[1], bias, atol=1e-9)


def test_fewer_images_than_weights_are_solved_in_float64():
    x, targets, weight, bias = problem(n=60, width=100)
    solved = fit_projection(x.float(), targets.float(), weight.float(), bias.float())
    assert solved.weight.dtype == solved.bias.dtype == torch.float64
    assert solved.weight.isfinite().all() and solved.ridge > 0


def test_the_ridge_is_the_best_of_a_held_out_fifth():
    x, targets, weight, bias = problem(noise=3.0)
    solved = fit_projection(x, targets, weight, bias)
    assert solved.drift_after < solved.drift_before
    held = torch.arange(80) % 5 == 4
    for factor in (0.1, 10.0):
        other = solve(x[~held], targets[~held], weight, bias, factor * solved.ridge)
        assert drift(x[held] @ other[0].T + other[1], targets[held]) >= solved.drift_after
    on_all = solve(x, targets, weight, bias, solved.ridge)
    assert torch.equal(solved.weight, on_all[0]) and torch.equal(solved.bias, on_all[1])
    assert fit_projection(x, targets, weight, bias, ridge=0.25).ridge == 0.25


def test_too_few_images_and_broken_embeddings_are_refused():
    x, targets, weight, bias = problem(n=49)
    with pytest.raises(UserError, match="at least 50 images, .* but got 49; try more images"):
        fit_projection(x, targets, weight, bias)
    x, targets, weight, bias = problem()
    targets[3, 2] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        fit_projection(x, targets, weight, bias)


class LoRA(nn.Linear):
    pass


def test_a_head_with_a_call_of_its_own_is_refused():
    hooked = nn.Linear(3, 2)
    hooked.register_forward_hook(lambda *_: None)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    hooked_none = nn.Identity()
    hooked_none.register_forward_hook(lambda *_: None)
    check_head(nn.Linear(3, 2))
    check_head(nn.Identity())
    for head in (hooked, parametrised, LoRA(3, 2), hooked_none):
        with pytest.raises(UserError, match="takes the place of the tower's head.*try"):
            check_head(head)
