"""Training checkpoints: what lies beside the weights does not matter, and of raw and averaged weights EMA is taken."""

import argparse
import collections
import pathlib
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_clip import by_timm, create_pair, create_theirs, create_tower
from timm.models import load_checkpoint

import patchrank
from patchrank.evaluate import main as evaluate_main
from patchrank.models.checkpoints.filter import checkpoint_filter_fn
from patchrank.models.checkpoints.load import load_pair, load_tower, read_checkpoint
from patchrank.utils.errors import UserError


def rename(path, old, new):
    """Writes other names into the pickles of a file that torch.save wrote."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(path.read_bytes().replace(old, new))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


BESIDE = {
    "open_clip": {"epoch": 3, "name": "run", "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]}, "scaler": {}},
    "numpy": {"values": [np.float32(1), np.int64(2), np.bool_(True), np.str_("a"), np.dtype("f4"), np.arange(3)]},
    "timm": {"arch": "vit", "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("out")), "metric": np.float64(7)},
    "lightning": {"hyper_parameters": collections.defaultdict(dict, a={"b": 1}), "callbacks": {}, "version": "2"},
    "torch": {"version": torch.__version__, "rng": torch.get_rng_state(), "counts": collections.Counter("ab")},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("numpy", [b"numpy.core.", b"numpy._core."])
@pytest.mark.parametrize("what", BESIDE)
def test_what_lies_beside_the_weights_is_left_out(tmp_path, what, numpy, zipped):
    path, weights = tmp_path / "last.pt", {"a": torch.randn(2, 3)}
    torch.save(BESIDE[what] | {"state_dict": weights}, path, _use_new_zipfile_serialization=zipped)
    for name in (b"numpy.core.", b"numpy._core."):
        rename(path, name, numpy)
    before = torch.serialization.get_safe_globals()
    read = read_checkpoint(path)
    assert list(read) == ["a"] and torch.equal(read["a"], weights["a"])
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize(
    "name", [b"omegaconf.dictconfig\nDictConfig", b"types\nSimpleNamespace", b"pathlib\nWindowsPath", b"typing\nAny"]
)
def test_objects_of_packages_that_are_not_installed(tmp_path, name):
    torch.save({"state_dict": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pt")
    rename(tmp_path / "w.pt", b"argparse\nNamespace", name)
    assert list(read_checkpoint(tmp_path / "w.pt")) == ["a"]


def test_weights_in_other_kinds_of_dictionaries(tmp_path):
    for name in (b"collections\ndefaultdict", b"pytorch_lightning.utilities.parsing\nAttributeDict"):
        torch.save({"state_dict": collections.defaultdict(list, a=torch.ones(2))}, tmp_path / "w.pt")
        rename(tmp_path / "w.pt", b"collections\ndefaultdict", name)
        assert torch.equal(read_checkpoint(tmp_path / "w.pt")["a"], torch.ones(2))


def test_threads_may_read_at_once(tmp_path):
    """torch keeps the names that it allows for all threads, so that one could take them from another."""
    torch.save(BESIDE["numpy"] | {"state_dict": {"a": torch.ones(2)}}, tmp_path / "w.pt")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(list(read) == ["a"] for read in pool.map(read_checkpoint, [tmp_path / "w.pt"] * 100))
    finally:
        sys.setswitchinterval(interval)


WRAPPERS = "state_dict model model_state_dict module model_state net network params weights".split()


@pytest.mark.parametrize("wrap", [*WRAPPERS, "model.module", "state_dict.model", "model.net.module"])
def test_weights_are_found_under_the_keys_of_known_trainers(tmp_path, capsys, wrap):
    state = content = create_theirs().state_dict()
    for key in reversed(wrap.split(".")):
        content = {"epoch": 1, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, key: content}
    torch.save(content, tmp_path / "w.pt")
    read = read_checkpoint(tmp_path / "w.pt")
    assert set(read) == set(state) and all(torch.equal(read[key], state[key]) for key in state)
    tower = create_tower()
    tower.load_state_dict(checkpoint_filter_fn(content, tower))  # as timm hands it over
    assert torch.equal(tower.norm.weight, state["visual.ln_post.weight"])
    assert capsys.readouterr().err == ""


def test_unknown_keys_of_weights_are_named(tmp_path):
    for content, message in [
        (
            {"student": {"a": torch.ones(2)}, "teacher": {"a": torch.ones(2)}, "epoch": 1},
            "'student', 'teacher', but.*try",
        ),
        ({"encoder": {"backbone": {"a": torch.ones(2)}}}, r"'encoder', but .*try torch.save\(checkpoint\['encoder'\]"),
        (torch.optim.Adam([torch.ones(1)]).state_dict(), "holds the state of an optimizer, not weights; try"),
        ({"model": {"a": np.ones(3)}}, "holds no weights by name: there is no tensor under 'model'"),
        (np.ones(3), "holds an object that is no tensor, not weights by name"),
    ]:
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(UserError, match=f"w.pt: .*{message}"):
            read_checkpoint(tmp_path / "w.pt")
    content = {"epoch": 1}
    content["model"] = content
    with pytest.raises(UserError, match="no weights by name"):
        checkpoint_filter_fn(content, create_tower())


@pytest.fixture(scope="module")
def digits():
    """The shipped pair's image tower and whole pair, raw, and with other final norms as the averages."""
    from safetensors.torch import load_file

    from patchrank.models.pretrained import WEIGHTS

    raw = load_file(WEIGHTS / "patchrank_clip_digits.safetensors")
    ema = raw | {"visual.norm.weight": raw["visual.norm.weight"] + 1}
    return raw, ema


def tower_of(pair):
    return {key.removeprefix("visual."): value for key, value in pair.items() if key.startswith("visual.")}


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_averaged_weights_come_through_every_door(tmp_path, capsys, digits, key, prefix):
    raw, ema = digits
    files = {"tower": tmp_path / "tower.pt", "pair": tmp_path / "pair.pt"}
    for name, of in (("tower", tower_of), ("pair", dict)):
        averaged = {f"{prefix}{part}": value for part, value in of(ema).items()}
        torch.save({"state_dict": of(raw), "model": of(raw), key: averaged}, files[name])
    live, direct = timm.create_model("patchrank_clip_digits"), timm.create_model("patchrank_clip_digits")
    load_tower(live, files["tower"])
    load_checkpoint(direct, str(files["tower"]), use_ema=True)
    make, overlay = timm.create_model, {"file": str(files["pair"])}
    doors = {
        "create_clip": patchrank.create_clip("patchrank_clip_digits", checkpoint=files["pair"]).visual,
        "load_tower": live,
        "load_checkpoint": direct,
        "checkpoint_path": make("patchrank_clip_digits", checkpoint_path=files["tower"]),
        "overlay": make("patchrank_clip_digits", pretrained=True, predictor_path="", pretrained_cfg_overlay=overlay),
        "state_dict": make("patchrank_clip_digits"),
    }
    doors["state_dict"].load_state_dict(checkpoint_filter_fn(torch.load(files["pair"]), live))
    for door, tower in doors.items():
        assert torch.equal(tower.norm.weight, ema["visual.norm.weight"]), door
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(
        f"takes the averaged weights (EMA) under {key!r}, as timm does" in line for line in said
    )
    assert doors["overlay"].pretrained_cfg["file"] == str(files["pair"])
    assert doors["overlay"].pretrained_cfg["state_dict"] is None


def test_commands_take_averaged_weights_too(tmp_path, capsys, digits):
    raw, ema = digits
    torch.save({"model": raw, "model_ema": ema}, tmp_path / "both.pt")
    torch.save(ema, tmp_path / "ema.pt")
    rows = []
    for name in ("both.pt", "ema.pt"):
        evaluate_main(f"--data digits --split val --limit 4 --reducer center --checkpoint {tmp_path / name}".split())
        said = capsys.readouterr()
        rows.append(said.out.replace(name, ""))
        assert ("(EMA) under 'model_ema', as timm does; the weights under 'model'" in said.err) == (name == "both.pt")
    assert rows[0] == rows[1]


def test_which_of_several_weights_is_taken_is_said(tmp_path, capsys):
    """timm's order of keys, an average that is empty, and averages that timm does not know."""
    one, other = {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    for content, said in [
        ({"state_dict_ema": one, "model_ema": other, "model": other}, "under 'state_dict_ema', as timm does; the"),
        ({"model": other, "state_dict": one}, ""),
        ({"state_dict_ema": {}, "model_ema": None, "state_dict": one}, ""),
        ({"state_dict": one, "ema": other}, "takes the weights under 'state_dict', as timm does, and not .* 'ema'"),
        ({"model_state_dict": other, "ema_state_dict": one}, "(EMA) under 'ema_state_dict'; the weights"),
        ({"model": one, "model_ema": {"decay": 0.9}, "ema": {"decay": 0.9}}, ""),
    ]:
        torch.save(content, tmp_path / "w.pt")
        assert torch.equal(read_checkpoint(tmp_path / "w.pt")["a"], one["a"])
        written = capsys.readouterr().err
        assert written.count("\n") == bool(said) and all(part in written for part in said.split(" .* "))


def test_averages_of_torch_itself(tmp_path):
    """`AveragedModel` counts its updates in a tensor of its own."""
    theirs = create_theirs()
    averaged = torch.optim.swa_utils.AveragedModel(theirs)
    torch.save({"model": theirs.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "w.pt")
    pair = create_pair()
    load_pair(pair, tmp_path / "w.pt")
    assert torch.equal(pair.visual.norm.weight, by_timm(theirs.state_dict())["norm.weight"])
