"""Which reducers go into which format: the table of docs/export.md, row by row."""

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.toy_exports import check_equal, create_tower, export, images_of

from patchrank.export.program import check_exportable
from patchrank.export.write import export_tower
from patchrank.layers.reducers import REDUCERS
from patchrank.utils.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs/export.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", PAGE.partition("## What works")[2], re.M)
CELLS = [(name, ending, told) for name, *cells in ROWS for ending, told in zip(("onnx", "pt2"), cells)]
WORKING = [(name, ending, {}) for name, ending, told in CELLS if told == "yes"]
WORKING += [(name, ending, {"leftovers": "merge"}) for name, ending, _ in WORKING if not REDUCERS[name].merges]
REFUSED = [(name, ending) for name, ending, told in CELLS if told.startswith("refused")]
SOME = [pytest.param("tome", "onnx", {}, marks=pytest.mark.slow), ("random", "pt2", {})]
MOVING = re.compile(r"Scatter|NonZero|Loop|If|Scan|Unique|Compress|Sequence|Random")  # sizes or places by data


def shapes(path: str, images: np.ndarray) -> dict[str, tuple[int, ...]]:
    """The shape of everything that is computed on the way."""
    model = onnx.load(path)
    names = [name for node in model.graph.node for name in node.output if name]
    there = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {name: value.shape for name, value in zip(names, session.run(names, {"images": images}))}


def check_graph(path: str) -> None:
    """No scatter and no branches; no size depends on what images show, and only the batch's on how many there are."""
    model = onnx.load(path)
    assert [node.op_type for node in model.graph.node if MOVING.match(node.op_type)] == []
    sizes = [dim for output in model.graph.output for dim in output.type.tensor_type.shape.dim[1:]]
    assert all(dim.dim_value for dim in sizes) and len(sizes) >= 2
    two, other, four = (shapes(path, scale * images_of(n).numpy()) for scale, n in ((1, 2), (100, 2), (1, 4)))
    assert len(two) > 50 and two == other
    for name, shape in two.items():
        assert all(many in (few, 2 * few) for few, many in zip(shape, four[name], strict=True)), name


def works(folder, name, ending, settings):
    tower, path = export(folder, name, ending, **settings)
    check_equal(tower, path)
    if ending == "onnx":
        check_graph(path)


def test_the_table_has_every_reducer_once():
    ours = [name for name, kind in REDUCERS.items() if kind.__module__.startswith("patchrank.")]
    assert sorted(name for name, *_ in ROWS) == sorted(ours)
    assert len(WORKING) + len(REFUSED) == len(CELLS) + sum(bool(each[2]) for each in WORKING)


@pytest.mark.parametrize("name, ending, settings", SOME)
def test_a_file_gives_what_its_tower_gives_at_any_batch_size(name, ending, settings, tmp_path):
    assert (name, ending, settings) in WORKING
    works(tmp_path, name, ending, settings)


def test_so_does_one_with_a_predictor(answering):
    assert answering.clip.visual.pruning.reducer == "predictor"
    check_equal(answering.clip.visual, answering.onnx)
    check_graph(answering.onnx)


@pytest.mark.slow
@pytest.mark.parametrize("name, ending, settings", WORKING)
def test_every_row_that_says_yes_works(name, ending, settings, tmp_path):
    works(tmp_path, name, ending, settings | {"depth": 4, "locations": (2, 3)})


@pytest.mark.parametrize("name, ending", REFUSED)
def test_every_row_that_says_refused_is_refused_in_one_line(name, ending, tmp_path):
    with pytest.raises(UserError, match=f"^reducer '{name}' .*; try ") as told:
        export_tower(create_tower(name), tmp_path / f"toy.{ending}")
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, ending, told", CELLS)
def test_nothing_else_is_refused(name, ending, told):
    tower = create_tower(name, depth=3, locations=(2,))
    with nullcontext() if told == "yes" else pytest.raises(UserError):
        check_exportable(tower, ending == "onnx")


def test_those_that_rank_stand_above_those_that_merge():
    """As the page says of `--leftovers merge`."""
    names = [name for name, *_ in ROWS]
    ranking = names[: names.index("evit")]
    assert not any(REDUCERS[name].merges for name in ranking)
    assert {name for name in names if not REDUCERS[name].merges} - set(ranking) == {"random", "golden"}
