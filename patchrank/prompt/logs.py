"""TensorBoard logs, where something that writes them is installed."""

from __future__ import annotations

import sys
from collections.abc import Mapping


class Logs:
    """Writes scalars of each epoch into a folder; None, or no writer installed: does nothing."""

    def __init__(self, folder: str | None):
        self.writer = None if folder is None else _create_writer(folder)

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Values of an epoch, counted from 0."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, epoch + 1)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _create_writer(folder: str):
    try:
        from tensorboardX import SummaryWriter  # comes with ray[tune]
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("no TensorBoard logs: neither tensorboardX nor tensorboard is installed", file=sys.stderr)
            return None
    return SummaryWriter(folder)
