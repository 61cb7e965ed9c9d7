"""`.pt2` archives: what is written comes back, and nothing that somebody else put into one is ever run."""

import contextlib
import io
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from helpers.image_files import encoded, pixels, write
from helpers.tiny_exports import changed, create_tower, images_of, pair_of, write_pt2

from patchrank.export import __main__ as export
from patchrank.export import program_file
from patchrank.export.answers import open_file
from patchrank.export.check import CheckedFile
from patchrank.export.program import ClassHead
from patchrank.utils.errors import UserError

WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
GRAPH, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"


SMALL = {"reducer": "center", "depth": 1, "locations": (1,)}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_pt2(tmp_path_factory.mktemp("good") / "tower.pt2", pair_of(create_tower(**SMALL)))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "somebody_was_here"


class Marks:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def edited(edit):
    """A change of a part that is JSON."""

    def change(content):
        found = json.loads(content)
        edit(found)
        return json.dumps(found).encode()

    return change


def with_pickled_weight(good, to, marker, padding=0):
    def edit(config):
        for entry in config["config"].values():
            if entry["path_name"] == "weight_0":
                entry["use_pickle"] = True

    weight = saved([Marks(marker), torch.zeros(padding)])
    return changed(good, to, {WEIGHTS: edited(edit), "data/weights/weight_0": lambda _: weight})


def with_object(kind):
    """An archive with a constant that torch unpickles by the name of its part."""

    def make(good, to, marker):
        entry = {"path_name": f"{kind}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        changes = {CONSTANTS: edited(lambda found: found["config"].update(x=entry))}
        return changed(good, to, changes, **{f"archive/data/constants/{kind}_0": pickle.dumps(Marks(marker))})

    return make


def with_pickled_samples(good, to, marker):
    return changed(good, to, {SAMPLES: lambda _: saved(Marks(marker))})


def with_size(good, to, marker):
    def edit(found):
        (size, *_) = found["graph_module"]["graph"]["tensor_values"]["images"]["sizes"]
        size["as_expr"]["expr_str"] = f"open({str(marker)!r}, 'w').fileno()"

    return changed(good, to, {GRAPH: edited(edit)})


def with_name(good, to, marker):
    code = json.dumps(f"images=open({str(marker)!r}, 'w')").encode()
    return changed(good, to, {GRAPH: lambda content: content.replace(b'"images"', code)})


def with_tree(good, to, marker):
    def edit(found):
        name = {"__enum__": True, "fqn": "module_of_somebody:Kind", "name": "X"}
        signature = found["graph_module"]["module_call_graph"][0]["signature"]
        signature["in_spec"] = signature["in_spec"].replace('"[]"', json.dumps(json.dumps([name])))

    (to.parent / "module_of_somebody.py").write_text(f"open({str(marker)!r}, 'w')")
    return changed(good, to, {GRAPH: edited(edit)})


def with_two_directories(good, to, marker):
    """Python's reader finds the good archive's list of parts, and torch's reader that of the bad one."""
    bad = Path(with_pickled_weight(good, to, marker, 10_000)).read_bytes()
    good = Path(changed(good, to, {})).read_bytes()
    (bad_end, bad_size, count), (end, size, _) = (_directory(content) for content in (bad, good))
    assert size == bad_size and bad_end > end
    parts, at = bytearray(good[end : end + size]), 0
    for _ in range(count):
        lengths, (offset,) = struct.unpack_from("<3H", parts, at + 28), struct.unpack_from("<I", parts, at + 42)
        struct.pack_into("<I", parts, at + 42, offset + bad_end - end)
        at += 46 + sum(lengths)
    to.write_bytes(bad[: bad_end + size] + good[:end] + parts + bad[bad_end + size :])
    return str(to)


def _directory(content):
    """Where the list of parts begins, its length, and how many they are."""
    count, size, offset = struct.unpack_from("<HII", content, content.rindex(b"PK\5\6") + 10)
    return offset, size, count


def assert_refused(path, told):
    with pytest.raises(UserError, match=f"^{path}: {told}.*; try to export it anew$") as caught:
        program_file.load(path)
    assert "\n" not in str(caught.value)


ATTACKS = {
    "pickled weight": (with_pickled_weight, "holds pickled tensors"),
    "object": (with_object("custom_obj"), "holds (pickled|the part)"),
    "opaque object": (with_object("opaque_obj"), "holds (pickled|the part)"),
    "samples": (with_pickled_samples, "cannot be loaded"),
    "size": (with_size, r"holds the size \"open\("),
    "name": (with_name, r"holds the name \"images=open"),
    "tree": (with_tree, "holds the name '.*builtins.tuple"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_torch_would_run_is_refused_unrun(attack, good, marker, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    make, told = ATTACKS[attack]
    path = make(good, tmp_path / "bad.pt2", marker)
    assert_refused(path, told)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", [*ATTACKS, "two lists"])
def test_torch_itself_runs_it(attack, good, marker, tmp_path, monkeypatch):
    """So the tests beside this one are of something."""
    monkeypatch.syspath_prepend(tmp_path)
    make, _ = ATTACKS.get(attack, (with_two_directories, None))
    with contextlib.suppress(Exception):
        torch.export.load(make(good, tmp_path / "bad.pt2", marker)).module(check_guards=False)
    assert marker.exists() or attack == "object"  # which is unpickled by TorchScript


@pytest.mark.filterwarnings("ignore")
def test_only_what_was_looked_through_is_loaded(good, marker, tmp_path):
    path = with_two_directories(good, tmp_path / "two.pt2", marker)
    module = program_file.load(path)
    assert not marker.exists() and torch.equal(module.tower.cls_token, create_tower(**SMALL).cls_token)


def target(name):
    def edit(found):
        found["graph_module"]["graph"]["nodes"][3]["target"] = name

    return {GRAPH: edited(edit)}


STRANGE = [
    ({}, {"archive/data/aotinductor/model/run.so": b""}, "holds the part 'archive/data/aotinductor/model/run.so'"),
    ({}, {"archive/data/weights/model.pt": b""}, "holds the part 'archive/data/weights/model.pt'"),
    ({}, {"version": b"1"}, "holds two parts of one name, or more than one folder"),
    ({}, {"other/version": b"1"}, "holds two parts of one name, or more than one folder"),
    (target("torch.ops.quantized.linear.default"), {}, "holds the operator torch.ops.quantized.linear.default"),
    (target("torch.ops.aten.from_file.default"), {}, "holds the operator torch.ops.aten.from_file"),
    (target("torch.ops.aten.save.default"), {}, "holds the operator torch.ops.aten.save"),
    (target("torch.ops.aten.__class__.__base__"), {}, "holds the operator torch.ops.aten.__class__"),
    (target("torch.ops.aten.add.__self__"), {}, "holds the operator torch.ops.aten.add.__self__"),
    (target("torch.hub.load"), {}, "holds the operator torch.hub.load"),
    (target("math.factorial"), {}, "holds the operator math.factorial"),
    (target("_operator.attrgetter"), {}, "holds the operator _operator.attrgetter"),
    ({GRAPH: lambda _: None}, {}, "cannot be loaded"),
    ({GRAPH: lambda content: content[:-1]}, {}, "cannot be loaded"),
    ({"data/weights/weight_0": lambda _: None}, {}, "cannot be loaded"),
    ({WEIGHTS: lambda _: b"[]"}, {}, "cannot be loaded"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes, added, told", STRANGE, ids=range(len(STRANGE)))
def test_archives_that_are_none_of_ours_are_refused_in_one_line(changes, added, told, good, tmp_path):
    assert_refused(changed(good, tmp_path / "bad.pt2", changes, **added), told)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_parts_of_one_name_are_refused(good, tmp_path):
    twice = {f"archive/{SAMPLES}": saved(torch.zeros(1))}
    assert_refused(changed(good, tmp_path / "bad.pt2", {}, **twice), "holds two parts of one name")


def test_a_file_cut_short_is_refused(good, tmp_path):
    (tmp_path / "cut.pt2").write_bytes(Path(good).read_bytes()[:1000])
    assert_refused(str(tmp_path / "cut.pt2"), r"cannot be loaded \(File is not a zip file")
    with pytest.raises(UserError, match="nowhere.pt2: cannot be loaded .*No such file"):
        program_file.load("nowhere.pt2")


SAID = [
    (
        lambda about: about["input"].update(size=[32, 24]),
        r"says that it takes images \[3, 32, 24\], but takes \[3, 32, 32\]",
    ),
    (
        lambda about: about["input"].update(dtype="uint8"),
        r"says that it takes images \[32, 32, 3\], but takes \[3, 32, 32\]",
    ),
    (lambda about: about["outputs"].pop(), "says that it gives embedding, which its graph does not"),
    (lambda about: about.pop("schedule"), "was not written by patchrank.export, or its metadata is damaged"),
]


@pytest.mark.parametrize("edit, told", SAID, ids=range(len(SAID)))
def test_an_archive_that_is_not_what_it_says_is_refused(edit, told, good, tmp_path):
    path = changed(good, tmp_path / "other.pt2", {"extra/patchrank.json": edited(edit)})
    with pytest.raises(UserError, match=f"^{path}: {told}; try to export anew$"):
        program_file.load(path)


def test_an_archive_that_takes_pixels_answers_without_warnings(tmp_path, recwarn, monkeypatch, capsys):
    clip = pair_of(create_tower(**SMALL))
    head = ClassHead(torch.randn(2, clip.visual.num_classes), 1.0)
    path = write_pt2(tmp_path / "tower.pt2", clip, head, uint8=True, classes=["a", "b"])
    picture = write(tmp_path / "x.png", encoded(pixels(32, 32)))
    recwarn.clear()
    torch.set_warn_always(True)  # torch tells each thing once
    try:
        assert export.main(["--check", path, "--image", str(picture)]) == 0
    finally:
        torch.set_warn_always(False)
    assert [str(each.message) for each in recwarn] == []
    found = json.loads(capsys.readouterr().out)["probabilities"]
    expected = CheckedFile(path).run(torch.from_numpy(pixels(32, 32))[None])[0]["probabilities"][0]
    assert dict(found) == pytest.approx(dict(zip("ab", expected.tolist())), abs=1e-6)


def test_every_way_to_a_program_looks_through_it_first(good, marker, tmp_path):
    path = with_pickled_weight(good, tmp_path / "bad.pt2", marker)
    for way in (open_file, CheckedFile, lambda path: export.main(["--check", path, "--image", "nowhere.png"])):
        with pytest.raises(UserError, match="bad.pt2: holds pickled tensors"):
            way(path)
    assert not marker.exists()


def test_a_program_is_made_of_operators_alone(good):
    """Not of torch's checks of shapes, which are code made of what an archive says."""
    kinds = {node.op for node in program_file.load(good).graph.nodes}
    assert kinds == {"placeholder", "get_attr", "call_function", "output"}


@torch.inference_mode()
def test_a_program_comes_back_and_lays_open_what_it_chose(good):
    tower, file = create_tower(**SMALL), CheckedFile(good)
    outputs, steps = file.run(images := images_of(tower, 3))
    expected = tower.forward_pruned(images)
    assert torch.equal(outputs["kept"], expected.kept)
    assert torch.equal(outputs["embedding"], torch.nn.functional.normalize(expected.embedding, dim=-1))
    (ranked,) = steps
    assert ranked.scores.shape == ranked.index.shape == (3, 16)
    assert torch.equal(ranked.index[:, :8], expected.kept)
    assert len(file.run(images)[1]) == 1  # of the last run alone
