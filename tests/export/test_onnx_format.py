"""ONNX files: the same bytes each time, nothing of the machine that made them, int8 where it does no harm."""

import getpass
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.toy_exports import create_tower, export
from torch import nn

from patchrank.export import onnx_format, write
from patchrank.export.metadata import KEY
from patchrank.export.onnx_session import OnnxFile
from patchrank.export.write import export_tower
from patchrank.utils.errors import UserError

ROOT = Path(__file__).parents[2]
LAYERS = 4  # linear ones of a block: qkv, proj, fc1, fc2


def weights_of(path: str) -> dict[str, int]:
    """The type of each of a file's tensors, by its name."""
    return {each.name: each.data_type for each in onnx.load(path).graph.initializer}


def test_operators_are_of_opset_20_and_of_onnx_alone(answering):
    model = onnx.load(answering.onnx)
    assert [(each.domain, each.version) for each in model.opset_import if each.domain in ("", "ai.onnx")] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("kind", ["onnx", "int8"])
def test_a_file_tells_nothing_of_the_machine_that_made_it(kind, answering):
    content = Path(getattr(answering, kind)).read_bytes()
    words = [str(ROOT), str(Path.home()), sys.prefix, "site-packages", "/tmp", str(Path(answering.onnx).parent), ".py"]
    words += [getpass.getuser()] if len(getpass.getuser()) > 4 else []
    assert [word for word in words if word.encode() in content] == []
    model = onnx.load(getattr(answering, kind))
    assert [each.key for each in model.metadata_props] == [KEY]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_int8_is_of_the_blocks_linear_layers_alone(answering):
    before, after = weights_of(answering.onnx), weights_of(answering.int8)
    exact = {name for name, kind in after.items() if kind == onnx.TensorProto.FLOAT and before.get(name) == kind}
    small = [name for name, kind in after.items() if kind == onnx.TensorProto.INT8 and name.endswith("_quantized")]
    products = [node for node in onnx.load(answering.int8).graph.node if node.op_type == "MatMulInteger"]
    assert len(small) == len(products) == 2 * LAYERS - 1  # qkv of the last block is of the class token in part
    for part in ("pruner.", "patch_embed.proj.weight", "norm"):
        ours = {name for name in before if part in name and before[name] == onnx.TensorProto.FLOAT}
        assert ours and ours <= exact, part
    assert not [name for name in small if "head" in name]
    floats = [node.op_type for node in onnx.load(answering.int8).graph.node if node.op_type in ("MatMul", "Gemm")]
    whole = [node.op_type for node in onnx.load(answering.onnx).graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(whole) - len(floats) == len(products)


def test_each_column_in_int8_has_a_scale_of_its_own(answering):
    dims = {each.name: tuple(each.dims) for each in onnx.load(answering.int8).graph.initializer}
    columns = {name: dim[1] for name, dim in dims.items() if name.endswith("_quantized")}
    assert columns and all(dims[name.replace("_quantized", "_scale")] == (count,) for name, count in columns.items())


def test_sizes_that_depend_on_the_batch_say_so(answering):
    """torch's own name for it is a number."""
    graph = onnx.load(answering.onnx).graph
    (batch, *side) = graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [dim.dim_value for dim in side] == [3, 32, 32]
    values = [*graph.output, *graph.value_info]
    named = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    assert "16*batch" in named and all(re.fullmatch(r"(\d+\*)?batch", name) for name in named)


@pytest.mark.parametrize(
    "scopes, stays",
    [
        ("['', 'tower', 'tower.blocks.0', 'tower.blocks.0.mlp.fc1', 'linear_3']", False),
        ("['', 'tower', 'tower.blocks.0.attn', 'tower.blocks.0.attn.qkv', 'linear']", False),
        ("['', 'tower', 'tower.pruner', 'tower.pruner.reducer.predictor.head', 'linear']", True),
        ("['', 'tower', 'tower.head', 'linear_24']", True),
        ("['', 'classes', 'matmul']", True),
    ],
)
def test_ranking_projection_and_classes_stay_in_float32(scopes, stays):
    node = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    node.metadata_props.add(key=onnx_format.SCOPES, value=scopes)
    assert onnx_format._stays(node) is stays


def test_int8_is_near_float32_and_says_what_it_is(answering):
    exact, small = OnnxFile(answering.onnx), OnnxFile(answering.int8)
    assert (exact.about["precision"], small.about["precision"]) == ("float32", "int8")
    assert {**small.about, "precision": "float32"} == exact.about
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
    cosine = (exact.run(images)["embedding"] * small.run(images)["embedding"]).sum(1)
    assert (cosine > 0.98).all() and (cosine < 1 - 1e-7).any()


def test_weights_of_more_than_a_file_holds_are_refused():
    onnx_format.check_size(0)
    onnx_format.check_size(2**31 - 2**24)
    with pytest.raises(UserError, match="^the weights take 2.0 GiB, but an ONNX file holds 2; try --format pt2$"):
        onnx_format.check_size(2**31 - 2**24 + 1)
    with pytest.raises(UserError, match="^the weights take 4.7 GiB"):
        onnx_format.check_size(5 * 10**9)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_told_before_anything_is_traced(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(write, "trace", lambda *args: pytest.fail("was traced"))
    with pytest.raises(UserError, match=f"^{package} is not installed; try pip install onnx onnxruntime onnxscript$"):
        export_tower(create_tower(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


class Sorted(nn.Module):
    def forward(self, images):
        orders = (images.argsort(dim=-1, descending=descending, stable=True) for descending in (True, False))
        return *orders, images.flatten(2).argmax(-1)


def test_of_tied_scores_the_lower_place_comes_first_as_in_torch():
    module, batch = Sorted(), torch.export.Dim("batch", min=1)
    images = torch.randint(0, 3, (5, 2, 4, 17), generator=torch.Generator().manual_seed(0)).float()
    program = torch.export.export(module, (images,), dynamic_shapes={"images": {0: batch}})
    model = onnx_format.to_onnx(program, ["falling", "rising", "best"], "toy")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for some in (images, images[:1], torch.zeros(2, 2, 4, 17)):
        for found, expected in zip(session.run(None, {"images": some.numpy()}), module(some), strict=True):
            assert np.array_equal(found, expected)
    chosen = [node.op_type for node in model.graph.node if node.op_type in onnx_format.CHOOSING]
    assert chosen == ["TopK", "TopK", "ArgMax"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_two_exports_give_the_same_bytes(ending, tmp_path):
    """In Pythons of their own, whose sets and dicts are in another order."""
    code = "import sys\nfrom pathlib import Path\nfrom helpers.toy_exports import export\n"
    code += f"export(Path(sys.argv[1]), 'predictor', {ending!r})"
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        path = f"{ROOT}:{ROOT / 'tests'}"
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": path, "PATH": "", "HOME": str(tmp_path / f"home{seed}")}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True, env=env, capture_output=True)
    first, second = (tmp_path / seed / f"toy.{ending}" for seed in ("1", "2"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_int8_goes_with_towers_alone(tmp_path):
    tower, path = export(tmp_path, "predictor")
    export_tower(tower, path, int8=tmp_path / "small.onnx")
    kinds = weights_of(str(tmp_path / "small.onnx"))
    assert not [name for name, kind in kinds.items() if kind == onnx.TensorProto.INT8 and "pruner" in name]
    assert not [name for name, kind in kinds.items() if kind == onnx.TensorProto.INT8 and "head" in name]
    small = [name for name, kind in kinds.items() if kind == onnx.TensorProto.INT8 and name.endswith("_quantized")]
    assert len(small) == 2 * LAYERS - 1
