"""An exported ONNX file, run by ONNX Runtime. Needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from patchrank.export.metadata import KEY, check_graph, parse_metadata
from patchrank.utils.errors import UserError, one_line


class OnnxFile:
    """An ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: local file.
        threads: that it may use; all cores if left out.
        content: an ONNX model to run in place of the file's own, such as one that shows more of what it computes.

    Attributes:
        about: what the file says of itself.

    Raises:
        UserError: ONNX Runtime is not installed, or the file cannot be read, is no ONNX or not ours.
    """

    def __init__(self, path: str | Path, threads: int | None = None, content: bytes | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("ONNX Runtime is not installed; try pip install onnxruntime") from error
        if not Path(path).is_file():
            raise UserError(f"{path}: there is no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(
                str(path) if content is None else content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors have no common class
            reason = one_line(error)[:200]
            raise UserError(f"{path}: ONNX Runtime cannot load it ({reason}); try to export anew") from error
        self.about = parse_metadata(self.session.get_modelmeta().custom_metadata_map.get(KEY), path)
        names = [output.name for output in self.session.get_outputs()]
        check_graph(self.about, self.session.get_inputs()[0].shape, names, path)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs by name: `probabilities` (B, C), `embedding` (B, E), `kept` (B, K), those that there are.

        Args:
            images: as `about["input"]` says.
        """
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {"images": images})))
