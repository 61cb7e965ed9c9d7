"""A traced tower as ONNX: its translation, its int8 form, and what it chooses by, laid open.

What ranks is a full sort, which becomes `TopK`. Of tied scores the lower place comes first in both.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.export import ExportedProgram

from patchrank.export.program import in_products
from patchrank.utils.errors import UserError, one_line

OPSET = 20  # the first with GELU as one operator; ONNX Runtime reads it from 1.17 on
MOST_BYTES = 2**31 - 2**24  # of weights: a protobuf holds 2 GiB in all
CHOOSING = ("TopK", "ArgMax", "ArgMin")
IN_FLOAT = ("pruner", "classes", "tower.head")  # parts whose products stay in float32: ranking, projection, classes
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes which module a node comes from


def to_onnx(program: ExportedProgram, outputs: list[str], reducer: str):
    """A traced tower as an ONNX model (`onnx.ModelProto`).

    Args:
        outputs: names of what it gives.
        reducer: what messages call what ranks.

    Raises:
        UserError: the packages are missing, weights of more than ONNX holds, or an operator without a form in ONNX.
    """
    check_installed()
    check_size(sum(each.nbytes for each in program.state_dict.values()))
    with _quiet(), in_products():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                custom_translation_table=_translations(),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = one_line(error.__cause__ or error)[:200]
            raise UserError(f"this tower with reducer {reducer!r} has no form in ONNX ({reason}); try .pt2") from error
    _call(made.model.graph, outputs)
    return _without_shapes_of_weights(made.model_proto)


def _without_shapes_of_weights(model):
    """Weights say their own shapes. torch 2.9 notes them again, and `quantize_dynamic` transposes the weights alone."""
    weights = {weight.name for weight in model.graph.initializer}
    others = [noted for noted in model.graph.value_info if noted.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(others)
    return model


def _call(graph, outputs: list[str]) -> None:
    """Names what a graph gives; values inside may be called the same, such as `embedding` by torch's lookup."""
    given = {id(value) for value in graph.outputs}
    inside = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in inside:
        if value.name in outputs and id(value) not in given:
            value.name = f"{value.name}.inner"
    for value, name in zip(graph.outputs, outputs):
        value.name = name


def check_installed() -> None:
    """Raises `UserError` where a package of the extra `export` is missing."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"{package} is not installed; try pip install onnx onnxruntime onnxscript") from error


def check_size(num_bytes: int) -> None:
    """Raises `UserError` for weights of more bytes than one ONNX file holds."""
    if num_bytes > MOST_BYTES:
        raise UserError(f"the weights take {num_bytes / 2**30:.1f} GiB, but an ONNX file holds 2; try --format pt2")


def to_int8(model):
    """The same ONNX model with ONNX Runtime's dynamic quantisation.

    The weights of linear layers become int8, and so do their inputs when it runs. Ranking, attention, norms, the
    patches' embedding, the projection and the class head stay in float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kept = [node.name for node in model.graph.node if _stays(node)]
    kept += [f"{name}_MatMul" for name in kept]  # what quantize_dynamic calls a Gemm before it looks at this list
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "int8.onnx")
        how = {"weight_type": QuantType.QInt8, "per_channel": True, "nodes_to_exclude": kept}
        quantize_dynamic(model, path, op_types_to_quantize=["MatMul", "Gemm"], **how)
        import onnx

        return onnx.load(path)


def _stays(node) -> bool:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")
    return any(f"'{part}'" in scopes or f"'{part}." in scopes or f".{part}" in scopes for part in IN_FLOAT)


def choices_of(model) -> list[list[str]]:
    """For each operator that ranks or chooses, in their order, the names of what it looks at and of its indices."""
    return [[node.input[0], node.output[-1]] for node in model.graph.node if node.op_type in CHOOSING]


def finished(model, about: Mapping[str, str]) -> bytes:
    """The bytes of a model's file, with metadata and without notes on whose code it was made by."""
    import onnx

    done = onnx.ModelProto()
    done.CopyFrom(model)
    for node in done.graph.node:
        del node.metadata_props[:]
    for value in [*done.graph.input, *done.graph.output, *done.graph.value_info, *done.graph.initializer]:
        del value.metadata_props[:]
    batch = done.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # torch's name for it is a number
    for value in [*done.graph.input, *done.graph.output, *done.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dim.dim_param.replace(batch, "batch")
    del done.metadata_props[:], done.graph.metadata_props[:]
    onnx.helper.set_model_props(done, dict(about))
    return done.SerializeToString(deterministic=True)


def laid_open(path: str) -> bytes:
    """A file's model with all that it ranks and chooses by among its outputs."""
    import onnx

    model = onnx.load(path)
    there = {output.name for output in model.graph.output}
    for name in dict.fromkeys(name for choice in choices_of(model) for name in choice):
        if name not in there:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    return model.SerializeToString()


def _translations() -> dict[Callable, Callable]:
    """Operators that the exporter has no translation of."""
    from onnxscript import opset20 as op

    def stable_sort(self, dim: int = -1, descending: bool = False, stable: bool = True):
        count = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: stable_sort}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell at length of what concerns nobody here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
