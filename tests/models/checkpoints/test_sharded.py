"""Weights in several files and in folders: read whole, or what is missing is named."""

import json
import os
import shutil

import fsspec
import pytest
import torch
from helpers.tiny_clip import create_pair, create_theirs, hugging_face
from safetensors.torch import save_file

import patchrank
from patchrank.models.checkpoints.load import load_pair, read_checkpoint
from patchrank.utils.errors import UserError

SAVE = {"safetensors": save_file, "bin": torch.save}
STEM = {"safetensors": "model", "bin": "pytorch_model"}


def write_shards(folder, state, suffix="safetensors", count=3):
    """As Hugging Face's `save_pretrained` writes a large model; returns the paths of its shards and of its index."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in state.items()}
    names = [f"{STEM[suffix]}-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        SAVE[suffix](dict(list(state.items())[i::count]), folder / name)
    index = folder / f"{STEM[suffix]}.{suffix}.index.json"
    weight_map = {key: names[i % count] for i, key in enumerate(state)}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return [folder / name for name in names], index


@pytest.fixture(scope="module")
def state():
    return hugging_face(create_theirs().state_dict())


def assert_same(read, state):
    assert set(read) == set(state) and all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("suffix", SAVE)
def test_index_folder_and_shard_are_read_whole(tmp_path, state, suffix):
    shards, index = write_shards(tmp_path / "clip", state, suffix)
    for path in (index, tmp_path / "clip", shards[0], shards[2]):
        assert_same(read_checkpoint(path), state)
    pair = create_pair()
    load_pair(pair, tmp_path / "clip")
    assert torch.equal(pair.logit_scale, state["logit_scale"])


def test_behind_a_url_too(tmp_path, state):
    shards, index = write_shards(tmp_path, state)
    for path in (*shards, index):
        with fsspec.open(f"memory://sharded/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    for name in ("", f"/{index.name}", f"/{shards[1].name}"):
        assert_same(read_checkpoint(f"memory://sharded{name}"), state)
    fsspec.filesystem("memory").rm(f"/sharded/{shards[2].name}")
    with pytest.raises(UserError, match="sharded: model-00003-of-00003.safetensors, one of its 3 shards, is not there"):
        read_checkpoint("memory://sharded")


def test_a_snapshot_of_the_hubs_cache(tmp_path, state):
    """Its files are links to others outside of it, which a machine's owner made and no index names."""
    shards, index = write_shards(tmp_path / "blobs", state)
    (tmp_path / "snapshot").mkdir()
    for i, path in enumerate((*shards, index)):
        os.rename(path, tmp_path / "blobs" / str(i))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{i}")
    assert_same(read_checkpoint(tmp_path / "snapshot"), state)
    assert_same(read_checkpoint(tmp_path / "snapshot" / shards[0].name), state)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin"])
def test_which_file_of_a_folder_is_read(tmp_path, name):
    """open_clip's pair before others, and safetensors before pickles."""
    for i, other in enumerate((name, "model.safetensors", "training_args.bin")):
        write = SAVE[other.rsplit(".", 1)[-1]]
        write({"a": torch.full((2,), float(i))}, tmp_path / other)
    assert read_checkpoint(tmp_path)["a"][0] == (1 if name == "pytorch_model.bin" else 0)


def test_a_tower_that_we_saved_is_read_from_its_folder(tmp_path, clip):
    patchrank.save_pretrained(clip.visual, tmp_path / "saved")
    assert_same(read_checkpoint(tmp_path / "saved"), clip.visual.state_dict())


def test_what_is_missing_or_odd_is_named(tmp_path, state):
    shards, index = write_shards(tmp_path / "clip", state)
    os.remove(shards[1])
    for path in (tmp_path / "clip", index, shards[0]):
        with pytest.raises(UserError, match="model-00002-of-00003.safetensors, one of its 3 shards, is not there; try"):
            read_checkpoint(path)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors does not hold .*; try to download"):
        read_checkpoint(index)
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors holds once more .*; try to download"):
        read_checkpoint(shards[0])
    shards[1].write_bytes(b"\x00" * 64)
    with pytest.raises(UserError, match="checkpoint .*/clip: model-00002-of-00003.safetensors: no safetensors file"):
        read_checkpoint(tmp_path / "clip")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "epoch_3.pt").touch()
    with pytest.raises(UserError, match="runs: is a folder with none of .*; try .*/runs/epoch_3.pt"):
        read_checkpoint(tmp_path / "runs")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weight_map": {"a": "../up.bin"}}, "names '../up.bin', which is no file of weights in its own folder"),
        ({"weight_map": {"a": "/etc/passwd.bin"}}, "names '/etc/passwd.bin', which is no"),
        ({"weight_map": {"a": "s3://bucket/w.bin"}}, "names 's3://bucket/w.bin', which is no"),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "names 'model.safetensors.index.json', which is no"),
        ({"weight_map": {"a": ["x"]}}, r"names \"\['x'\]\", which is no"),
        ({"weight_map": {}}, "holds no weights by name"),
        ({"weight_map": "a"}, "is no index of shards"),
        ({"a": 1}, "is no index of shards"),
        ([1], "is no index of shards"),
    ],
)
def test_an_index_names_files_beside_it_alone(tmp_path, content, message):
    torch.save({"a": torch.ones(2)}, tmp_path / "up.bin")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(tmp_path / "clip")
    assert "\n" not in str(caught.value)
