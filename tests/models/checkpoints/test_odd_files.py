"""Files that people mistake for checkpoints: each is named in one line that says what to try."""

import pickle

import numpy as np
import pytest
import torch
from helpers.tiny_clip import create_pair, create_theirs
from safetensors.torch import save_file

from patchrank.io.tensor_file import write_tensors
from patchrank.models.checkpoints.load import load_pair
from patchrank.utils.errors import UserError


def numbers(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(2))


def ours(kind):
    return lambda path: write_tensors(path, kind, {"a": torch.ones(2)}, {})


ODD = {
    "GGUF": (lambda path: path.write_bytes(b"GGUF\x03" + bytes(60)), "a GGUF file; try"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60)), "an HDF5 file, .*; try"),
    "ONNX": (
        lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(60)),
        "no safetensors file, no torch",
    ),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "a web page; try to download the file again"),
    "JSON": (lambda path: path.write_text('{"a": 1}'), "a JSON file; try"),
    "a pickle of arrays": (
        lambda path: path.write_bytes(pickle.dumps({"a": np.ones(2)})),
        "torch.save did not write.*try",
    ),
    "arrays": (numbers, "a zip archive that torch.save did not write; try"),
    "a predictor": (ours("predictor"), "holds the predictor of a model and not its weights; try --predictor"),
    "prompts": (ours("prompts"), "holds the prompts of a model and not its weights; try --prompts"),
    "an odd file of ours": (lambda path: save_file({"a": torch.ones(1)}, path, {"patchrank": "[]"}), "damaged"),
    "integers": (lambda path: save_file(int8(), path), "is of torch.int8, not torch.float32, and .* more do not fit"),
    "no tensors": (lambda path: save_file({}, path), "holds no weights by name$"),
    "a list": (lambda path: torch.save([torch.ones(1)], path), "holds a list, not weights by name"),
    "protocol 4": (lambda path: torch.save({"a": torch.ones(1)}, path, pickle_protocol=4), "Unsupported operand"),
}


def int8():
    return {key: value.to(torch.int8) for key, value in create_theirs().state_dict().items()}


@pytest.mark.parametrize("what", ODD)
def test_odd_files_are_named_in_one_line(tmp_path, capsys, recwarn, what):
    write, message = ODD[what]
    write(tmp_path / "w")
    recwarn.clear()
    with pytest.raises(UserError, match=f"checkpoint .*/w: .*{message}") as caught:
        load_pair(create_pair(), tmp_path / "w")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not recwarn.list and capsys.readouterr().err == ""
