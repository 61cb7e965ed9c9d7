"""How towers run while they are measured: device, precision, compilation, CUDA graphs. One mode holds for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchrank.utils.compiling import raise_graph_limit
from patchrank.utils.device import check_device
from patchrank.utils.errors import UserError, is_out_of_memory, one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What follows cuDNN's attention takes a bias where cuDNN's has no kernel for one (proportional attention).
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BEFORE_CAPTURE = 3  # runs on a stream of their own before a CUDA graph is captured, as torch's documentation asks for


@dataclass(frozen=True)
class Mode:
    """How every tower of a table runs.

    device: as torch names it.
    dtype: of weights and images, a key of `DTYPES`.
    compile: whether `torch.compile` makes one graph of each tower.
    cuda_graphs: whether each tower is captured once as a CUDA graph, and replayed.
    cudnn_attention: whether cuDNN's attention comes first among torch's kernels.
    """

    device: str = "cpu"
    dtype: str = "fp32"
    compile: bool = False
    cuda_graphs: bool = False
    cudnn_attention: bool = False

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def check(self) -> None:
        """Raises `UserError` for a device that is not there, or for what it cannot do."""
        check_device(self.device)
        kind = torch.device(self.device).type
        if self.dtype == "fp16" and kind == "cpu":
            raise UserError("--dtype fp16: CPUs run it too slowly to compare; try bf16, or --device cuda")
        if self.dtype == "bf16" and self.on_gpu and not torch.cuda.is_bf16_supported():
            raise UserError(f"--dtype bf16: {torch.cuda.get_device_name(self.device)} has none; try fp16")
        for flag, wanted in (("--cuda-graphs", self.cuda_graphs), ("--cudnn-attention", self.cudnn_attention)):
            if wanted and not self.on_gpu:
                raise UserError(f"{flag} needs a GPU, but the device is {self.device}; try --device cuda, or without")

    def place(self, tower: nn.Module) -> nn.Module:
        """A tower on the device and in the precision of this mode, for inference."""
        return tower.eval().to(self.device, DTYPES[self.dtype])

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Random numbers of a shape, made where they are used."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=DTYPES[self.dtype])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inference on this device, with the attention kernels of this mode."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self.compile:  # a table has more shapes than torch keeps by itself
                raise_graph_limit()
            if self.on_gpu:  # events and waiting are of the current device
                stack.enter_context(torch.cuda.device(self.device))
            if self.cudnn_attention:
                stack.enter_context(sdpa_kernel(ATTENTION, set_priority=True))
            yield

    def compiled(self, tower: nn.Module) -> Callable[[Tensor], Tensor]:
        """The tower as it runs: as it is, or compiled to one graph for each batch size."""
        return torch.compile(tower, fullgraph=True, dynamic=False) if self.compile else tower

    def ready(self, name: str, tower: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
        """What to time for a tower of `compiled`, once it has run on images of this shape.

        Raises:
            UserError: it cannot be compiled, or captured as a CUDA graph. Names it as `name`.
        """
        try:
            tower(images)
            return _captured(tower, images) if self.cuda_graphs else tower
        except RuntimeError as error:
            if is_out_of_memory(error) or not (self.compile or self.cuda_graphs):
                raise
            flags = [flag for flag, on in (("--compile", self.compile), ("--cuda-graphs", self.cuda_graphs)) if on]
            reason = one_line(error)[:200]
            raise UserError(f"method {name!r} does not run with {' '.join(flags)} ({reason}); try without") from error


def _captured(tower: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that copies images to a fixed place and replays a CUDA graph of the tower on them."""
    fixed = images.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(BEFORE_CAPTURE):
            tower(fixed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        embedding = tower(fixed)

    def replay(given: Tensor) -> Tensor:
        fixed.copy_(given)
        graph.replay()
        return embedding

    return replay
