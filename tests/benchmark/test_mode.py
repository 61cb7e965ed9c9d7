"""How towers of a table run: what a device cannot do, and what a CUDA graph replays."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from patchrank.benchmark.mode import Mode
from patchrank.utils.errors import UserError


@pytest.mark.parametrize(
    "mode, message",
    [
        (Mode(dtype="fp16"), "--dtype fp16: CPUs run it too slowly to compare; try bf16"),
        (Mode(cuda_graphs=True), "--cuda-graphs needs a GPU, but the device is cpu"),
        (Mode(cudnn_attention=True), "--cudnn-attention needs a GPU"),
        (Mode("cuda:9"), "device 'cuda:9' cannot be used here"),
    ],
)
def test_what_a_device_cannot_do_is_told(mode, message):
    with pytest.raises(UserError, match=message):
        mode.check()


def test_towers_and_images_have_the_precision_that_is_asked_for(tower):
    mode = Mode(dtype="bf16")
    placed, images = mode.place(tower), mode.random(2, 3, 64, 64, seed=4)
    with mode.running():
        assert placed(images).dtype == torch.bfloat16 and torch.is_inference_mode_enabled()
    assert torch.equal(images, mode.random(2, 3, 64, 64, seed=4))


@pytest.mark.skipif(not hasattr(torch.compiler.config, "recompile_limit"), reason="this torch keeps it private")
def test_torch_may_keep_a_form_of_each_tower_and_batch_size():
    """By itself it keeps eight of one function, and says nothing when it runs the others as they are."""
    with torch.compiler.config.patch(recompile_limit=8, accumulated_recompile_limit=2000):
        with Mode().running():
            assert torch.compiler.config.recompile_limit == 8
        with Mode(compile=True).running():
            assert torch.compiler.config.recompile_limit == 1024
        assert torch.compiler.config.accumulated_recompile_limit == 2000  # a higher one stays
    with torch.compiler.config.patch(accumulated_recompile_limit=256), Mode(compile=True).running():
        assert torch.compiler.config.accumulated_recompile_limit == 1024


def test_a_tower_that_cannot_be_compiled_is_named(images):
    def fails(_):
        raise RuntimeError("no compiler\nwas found")

    with pytest.raises(UserError, match=r"'tome' does not run with --compile \(no compiler was found\); try without"):
        Mode(compile=True).ready("tome", fails, images)
    with pytest.raises(RuntimeError, match="no compiler"):  # a fault of ours shows its traceback
        Mode().ready("tome", fails, images)


def test_a_cuda_graph_is_captured_after_runs_of_its_own_and_replayed_on_what_is_given(monkeypatch):
    """By stand-ins for torch's own: nothing here runs on a GPU."""
    said, now = [], SimpleNamespace(wait_stream=lambda other: said.append("waits"))

    @contextmanager
    def capture(graph):
        said.append("capture")
        yield
        said.append("captured")

    cuda = {
        "Stream": lambda: now,
        "current_stream": lambda: now,
        "stream": lambda stream: torch.inference_mode(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: said.append("replay")),
        "graph": capture,
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    seen = []

    def tower(x):
        said.append("run")
        seen.append(x)
        return x

    images = torch.ones(2)
    replay = Mode(cuda_graphs=True).ready("timm", tower, images)
    assert said == ["run", "waits", "run", "run", "run", "waits", "capture", "run", "captured"]
    assert replay(torch.full((2,), 7.0)).tolist() == [7, 7] and said[-1] == "replay"
    assert len({each.data_ptr() for each in seen[1:]}) == 1 and images.tolist() == [1, 1]
