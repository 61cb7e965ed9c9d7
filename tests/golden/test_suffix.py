"""Batches of sequences without windows, which run side by side where torch has several threads on a CPU."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from patchrank.golden import suffix
from patchrank.golden.scores import score_images


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ran_in(monkeypatch):
    """The threads in which batches ran, and how many torch would have used in each."""
    found, original = [], suffix.embed

    def embed(*args):
        found.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return original(*args)

    monkeypatch.setattr(suffix, "embed", embed)
    return found


def threads_of_a_new_thread():
    """What torch uses in a thread that begins now; the caller's own thread never forgets what it was told."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_batches_run_side_by_side_and_score_the_same(tower, images, two_threads, ran_in):
    found = score_images(tower, images, stride=2, batch_size=8)
    assert set(ran_in[1:]) == {(False, 1)}  # the first one is of whole images, a batch alone
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2
    torch.set_num_threads(1)
    ran_in.clear()
    alone = score_images(tower, images, stride=2, batch_size=8)
    assert set(ran_in) == {(True, 1)}
    torch.testing.assert_close(found.windows, alone.windows, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("where", ["blocks.10.mlp", "norm", "head", ""])
@pytest.mark.slow
def test_what_hangs_on_a_tower_is_called_by_the_callers_thread(tower, images, two_threads, ran_in, where):
    tower.get_submodule(where).register_forward_hook(lambda *_: None)
    score_images(tower, images, stride=2, batch_size=8)
    assert set(ran_in) == {(True, 2)}


def test_an_error_of_a_batch_reaches_the_caller_and_threads_are_as_before(two_threads):
    def run(part):
        raise ValueError("of this batch")

    with pytest.raises(ValueError, match="of this batch"):
        suffix.in_threads(run, torch.zeros(4, 1).split(1))
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2
