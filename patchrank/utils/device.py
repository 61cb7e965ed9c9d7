"""The machine: which device can be used, what hardware it is, and how exactly it multiplies."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from patchrank.utils.errors import UserError


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 without TF32, as published scores want it; a no-op on CPUs."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def check_device(device: str) -> None:
    """Refuses a device that torch does not know or this machine does not have."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = str(error).splitlines()[0].split(". ")[0]  # torch goes on for a page
        raise UserError(f"device {device!r} cannot be used here ({reason}); try cpu") from error


def hardware(device: str = "cpu") -> dict:
    """What milliseconds belong to, and are not comparable without."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    """As Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
