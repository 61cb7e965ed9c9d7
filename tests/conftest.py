import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WDS_SECURE"] = "1"
os.environ["PATCHRANK_CACHE"] = tempfile.mkdtemp(prefix="patchrank-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share two cores, and tests are too small for threads

import pytest
import timm
import torch

import patchrank
from patchrank.prompt import tuning


def pytest_collection_modifyitems(items):
    """The longest files, those that start clusters, come first: pytest-xdist hands out whole files."""
    items.sort(key=lambda item: item.path.parent.name != "cluster")


def pytest_collection_finish():
    """What imports made stays: looking through it again and again for garbage took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_unconfigure():
    gc.unfreeze()  # libraries count what is left at their end
    shutil.rmtree(os.environ["PATCHRANK_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def clip():
    """The embedded pair with the weights that ship; tests that prune it undo it."""
    return patchrank.create_clip("patchrank_clip_digits")


@pytest.fixture(autouse=True)
def unpruned(request):
    yield
    if "clip" in request.fixturenames:
        request.getfixturevalue("clip").visual.set_pruning(
            keep_rate=1.0, drop_counts=None, locations=(4, 6, 8, 10), reducer="predictor"
        )


@pytest.fixture
def tower():
    """A random tower of the embedded shape, in evaluation mode."""
    torch.manual_seed(0)
    return timm.create_model("patchrank_clip_digits").eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def killed_in_second_epoch(monkeypatch):
    """Interrupts the second epoch of prompt tuning that is begun; the list of all that were begun."""
    real, begun = tuning.train_epoch, []

    def train_epoch(feed, state, epoch, bar):
        begun.append(epoch)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(feed, state, epoch, bar)

    def arm():
        monkeypatch.setattr(tuning, "train_epoch", train_epoch)
        return begun

    return arm
