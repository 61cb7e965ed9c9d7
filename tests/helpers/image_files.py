"""Small image files for tests of a user's own data."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(height: int = 8, width: int = 12, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random uint8 values (height, width, channels); no two places of the default size look alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray | None = None, kind: str = "PNG", **options: object) -> bytes:
    """An image as a file; random pixels where none is given."""
    image = pixels() if image is None else image
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def trap(folder: Path) -> bytes:
    return pickle.dumps(Trap(folder))
