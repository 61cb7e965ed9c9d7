"""The paper's eight datasets by name, with CoOp's folders, splits and class names."""

from patchrank.data.coop.datasets import NAMED, NamedDataset, load_named

__all__ = ["NAMED", "NamedDataset", "load_named"]
