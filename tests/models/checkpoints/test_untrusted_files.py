"""Files that nobody vouches for: TorchScript archives read as data, damaged files, and files that would run code."""

import json
import os
import pickle
import zipfile
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from helpers.tiny_clip import FORMATS, create_pair, create_theirs, create_tower
from torch import nn

from patchrank.models.checkpoints.load import load_pair, load_tower, read_checkpoint
from patchrank.utils.errors import UserError


@pytest.fixture(scope="module")
def theirs():
    return create_theirs()


@pytest.mark.parametrize("made", ["script", "trace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_are_read_without_torch_jit(theirs, tmp_path, monkeypatch, made, dtype):
    clip = deepcopy(theirs).to(dtype)
    inputs = torch.randn(1, 3, 32, 32, dtype=dtype), torch.ones(1, 16, dtype=torch.long)
    script = torch.jit.script(clip) if made == "script" else torch.jit.trace(clip, inputs, check_trace=False)
    torch.jit.save(script, tmp_path / "clip.pt")
    monkeypatch.setattr(torch.jit, "load", None)
    read, state = read_checkpoint(tmp_path / "clip.pt"), clip.state_dict()
    assert set(read) - {"attn_mask"} == set(state)
    for key, value in state.items():
        assert torch.equal(read[key], value) and read[key].dtype == dtype and read[key].stride() == value.stride()
    pair = create_pair()
    load_pair(pair, tmp_path / "clip.pt")
    assert pair.visual.head.weight.dtype == torch.float32  # upcast
    assert torch.equal(pair.text.positional_embedding, clip.positional_embedding.float())


@pytest.mark.filterwarnings("ignore")
def test_views_and_odd_tensors_of_an_archive(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.arange(24.0).view(4, 6)
            views = {"whole": whole, "transposed": whole.T, "strided": whole[1::2, 1::3], "scalar": torch.tensor(3.5)}
            views |= {"empty": torch.empty(0, 3), "yes": torch.tensor([True, False]), "bytes": torch.arange(5).byte()}
            views |= {"wide": torch.rand(3).double(), "brain": torch.rand(3).bfloat16(), "count": torch.tensor(7)}
            views |= {"expanded": torch.tensor(2.0).expand(3, 2)}
            for name, value in views.items():
                self.register_buffer(name, value)
            self.inner = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
            self.names, self.table = ["a"], {"b": 1}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    odd = Odd()
    torch.jit.save(torch.jit.script(odd), tmp_path / "odd.pt")
    read, state = read_checkpoint(tmp_path / "odd.pt"), odd.state_dict()
    assert set(read) == set(state)
    for key, value in state.items():
        assert torch.equal(read[key], value) and read[key].dtype == value.dtype, key
        assert read[key].stride() == value.stride(), key
    assert read["whole"].data_ptr() == read["transposed"].data_ptr()


def test_files_that_are_no_checkpoints(theirs, tmp_path):
    for form, write in FORMATS.items():
        write(theirs.state_dict(), tmp_path / "whole")
        whole = (tmp_path / "whole").read_bytes()
        for length in (8, 40, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(UserError, match="checkpoint .*/cut: ") as caught:
                read_checkpoint(tmp_path / "cut")
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500, form
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("folder/notes.txt", "hello")
    (tmp_path / "empty").touch()
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, message in [
        ("zip", "no torch file .*a zip archive that torch.save did not write"),
        ("empty", "it is empty"),
        ("pointer", "it begins with b'version https://'"),
        ("absent", "there is no such file"),
        ("", "is a folder with none of open_clip_model.safetensors, "),
    ]:
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / name)


class Malicious:
    """Unpickled by an ordinary reader, it leaves a mark."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def forge(archive, into, **members):
    """A copy of a TorchScript archive with some of its members replaced."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(into, "w") as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.split("/")[-1].removesuffix(".pkl"), None) or old.read(name))


MALICIOUS = {
    "pickle.pt": lambda bad, path: path.write_bytes(pickle.dumps(bad, protocol=2)),
    "protocol4.pt": lambda bad, path: path.write_bytes(pickle.dumps(bad, protocol=4)),
    "zip.pt": lambda bad, path: torch.save(bad, path),
    "wrapped.pt": lambda bad, path: torch.save({"state_dict": {"a": torch.ones(2), "b": bad}}, path),
    "legacy.pth": lambda bad, path: torch.save({"a": bad}, path, _use_new_zipfile_serialization=False),
    "named.safetensors": lambda bad, path: torch.save({"a": bad}, path),
    "plain.safetensors": lambda bad, path: path.write_bytes(pickle.dumps(bad, protocol=2)),
    "open_clip_pytorch_model.bin": lambda bad, path: torch.save({"visual.proj": torch.ones(2), "x": bad}, path),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_code_in_a_pickle_is_not_run(tmp_path, name):
    mark, path = tmp_path / "mark", tmp_path / name
    MALICIOUS[name](Malicious(mark), path)
    for load in (read_checkpoint, partial(load_tower, create_tower()), partial(load_pair, create_pair())):
        with pytest.raises(UserError, match=f"checkpoint .*{name}: .*pickle") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def text(value):
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def call(module, name, *arguments):
    """A pickle's call of a name with arguments that are pickled already."""
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


NESTED = text(pickle.dumps(Malicious("never"), protocol=2).decode("latin1"))
ENCODED = call("_codecs", "encode", NESTED, text("latin1"))
MKDIR = call("os", "mkdir", text("never"))
OBJECTS = call("numpy", "dtype", text("O8"))
HARMLESS = {  # they use the names that are known, and come back as nothing
    **{
        f"an object scalar of numpy.{core}": call(f"numpy.{core}.multiarray", "scalar", OBJECTS, ENCODED)
        for core in ("core", "_core")
    },
    "an array of objects": call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", b"K\x00\x85", text("b"))
    + b"(K\x01K\x01\x85" + OBJECTS + b"\x89]" + ENCODED + b"atb",
    "a name in two halves": call("numpy", "core.multiarray.scalar", OBJECTS, ENCODED),
    "a dictionary of odd kinds": call("collections", "defaultdict", b"cbuiltins\nint\n", ENCODED),
    "arguments with methods": b"cargparse\nNamespace\n)\x81}" + text("__class__") + text("__reduce__") + b"sb",
}  # fmt: skip
REFUSED = {
    "a call as a scalar": (call("numpy.core.multiarray", "scalar", OBJECTS, MKDIR), "mkdir"),
    "a call in a state": (b"cargparse\nNamespace\n)\x81}" + text("a") + MKDIR + b"sb", "mkdir"),
    "a factory that runs": (call("collections", "defaultdict", b"cbuiltins\neval\n"), "eval"),
    "a method of a path": (call("pathlib", "PosixPath.mkdir", text("never")), "PosixPath.mkdir"),
    "NumPy's own reader": (call("numpy", "load", text("never"), b"N", b"\x88"), "numpy.load"),
    "an attribute": (call("builtins", "getattr", b"cargparse\nNamespace\n", text("__init__")), "getattr"),
    "our own reader": (call("patchrank.models.checkpoints.pickled", "load_pickled", text("x")), "load_pickled"),
    "an unknown encoding": (call("_codecs", "encode", text("a"), text("no.such")), "unknown encoding"),
    "a class that is built": (b"cargparse\nNamespace\n}" + text("__init__") + b"K\x01sb", "damaged"),
    "a call of what a call made": (call("numpy", "dtype", text("O8")) + text("a") + b"\x85R", "damaged"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", [*HARMLESS, *REFUSED])
def test_names_that_are_known_run_nothing(tmp_path, monkeypatch, what, zipped):
    """A file of torch.save beside whose weights lies a forged object."""
    monkeypatch.chdir(tmp_path)
    forged, message = (HARMLESS[what], "") if what in HARMLESS else REFUSED[what]
    marker = text("here")
    torch.save({"state_dict": {"a": torch.ones(2)}, "b": "here"}, "whole.pt", _use_new_zipfile_serialization=zipped)
    if zipped:
        with zipfile.ZipFile("whole.pt") as archive:
            pickled = archive.read("whole/data.pkl")
        forge("whole.pt", "w.pt", data=pickled.replace(marker, forged))
    else:
        pickled = (tmp_path / "whole.pt").read_bytes()
        (tmp_path / "w.pt").write_bytes(pickled.replace(marker, forged))
    assert marker in pickled
    if what in HARMLESS:
        assert list(read_checkpoint("w.pt")) == ["a"]
    else:
        with pytest.raises(UserError, match=f"w.pt: .*{message}") as caught:
            read_checkpoint("w.pt")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()


def test_tensors_bring_no_attributes(tmp_path):
    """torch saves what is set on a tensor, so that a file may put its own in place of a tensor's methods."""
    disguised = torch.ones(2)
    disguised.detach = disguised.numel = set
    torch.save({"a": disguised}, tmp_path / "w.pt")
    (read,) = read_checkpoint(tmp_path / "w.pt").values()
    assert torch.equal(read, torch.ones(2)) and read.numel() == 2 and not vars(read)


def test_what_is_refused_says_how_to_save_weights_alone(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(
        UserError, match=r"asks for torch.nn.modules.linear.Linear.*try torch.save\(model.state_dict\(\)"
    ):
        read_checkpoint(tmp_path / "w.pt")


def test_the_test_above_can_fail(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "linear.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    return path


MODULE = b"\x80\x02c__torch__\nM\n)\x81"  # an object of the archive, to be given its attributes
VIEW = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
FORGED = {
    "a call": (pickle.dumps(Malicious("never"), protocol=2), "asks for .*mkdir, which is no tensor"),
    "a dotted name": (b"\x80\x04\x8c\x05torch\x8c\x08jit.load\x93.", "asks for torch.jit.load"),
    "a partial": (b"\x80\x02cfunctools\npartial\n.", "asks for functools.partial"),
    "an attribute of a class": (b"\x80\x02c__torch__\nM\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "damaged"),
    "no module": (b"\x80\x02}.", "holds a dict, not a module"),
    "itself": (b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00mh\x00sb.", "one inside itself"),
    "a storage too short": (
        MODULE + b"}X\x01\x00\x00\x00w" + VIEW + b"X\x03\x00\x00\x00cpuK\x04tQK\x00(M\x00\x10t(K\x01t\x89}tRsb.",
        "out of bounds",
    ),
    "no such storage": (MODULE + b"}X\x01\x00\x00\x00w" + VIEW.replace(b"0", b"7") + b"NNtQ.", "no item named"),
    "a name that is none": (MODULE + b"}K\x01K\x02sb.", "name is a int"),
    "a memo of gigabytes": (MODULE + b"r\xff\xff\xff\x7f}b.", "2147483647 places in the memo"),
    "a string of gigabytes": (b"\x80\x04\x8e\xff\xff\xff\xff\x0f\x00\x00\x00.", "damaged"),
    "half a pickle": (MODULE, "damaged"),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_archives_are_refused(tmp_path, archive, what):
    content, message = FORGED[what]
    forge(archive, tmp_path / "forged.pt", data=content)
    with pytest.raises(UserError, match=f"forged.pt: .*{message}") as caught:
        read_checkpoint(tmp_path / "forged.pt")
    assert "\n" not in str(caught.value)
    assert not os.path.exists("never")


def test_constants_and_code_of_an_archive_stay_unread(tmp_path, archive):
    bad = pickle.dumps(Malicious(tmp_path / "mark"), protocol=2)
    forge(archive, tmp_path / "forged.pt", constants=bad)
    read, expected = read_checkpoint(tmp_path / "forged.pt"), read_checkpoint(archive)
    assert all(torch.equal(read[key], value) for key, value in expected.items()) and len(read) == 2
    assert not (tmp_path / "mark").exists()


def test_an_archive_of_the_other_byte_order_is_refused(tmp_path, archive):
    forge(archive, tmp_path / "big.pt", byteorder=b"big")
    with pytest.raises(UserError, match="big-endian"):
        read_checkpoint(tmp_path / "big.pt")


def test_timms_own_ways_of_reading_run_nothing_either(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"state_dict": Malicious(mark)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "patchrank_clip_digits", "pretrained_cfg": {}}))
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "pytorch_model.bin")}}
    with pytest.raises(RuntimeError, match="weights_only=True blocked .*mkdir"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(UserError, match="checkpoint .*model.bin: a pickle that asks for .*mkdir"):
        timm.create_model("patchrank_clip_digits", pretrained=True, **overlay)
    assert not mark.exists()


def test_create_clip_reads_files_by_the_same_rules(tmp_path):
    import patchrank

    torch.save({"state_dict": Malicious(tmp_path / "mark")}, tmp_path / "bad.bin")
    with pytest.raises(UserError, match="checkpoint .*bad.bin: a pickle that asks for"):
        patchrank.create_clip("patchrank_clip_digits", checkpoint=tmp_path / "bad.bin")
    assert not (tmp_path / "mark").exists()
