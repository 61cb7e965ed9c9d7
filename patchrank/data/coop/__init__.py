"""The eight datasets of the paper by name, as CoOp lays them out, splits them and calls their classes."""

from patchrank.data.coop.datasets import NAMED, NamedDataset, load_named

__all__ = ["NAMED", "NamedDataset", "load_named"]
