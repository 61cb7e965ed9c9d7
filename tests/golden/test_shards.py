import io
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from patchrank.data.dataset_factory import load_split
from patchrank.golden.dataset import read_ranked
from patchrank.golden.make_shards import make_shards, shard_folder
from patchrank.golden.shards import Sample, ShardFolder, read_manifest, stream
from patchrank.utils.errors import UserError

HEADER = {"schema": 1, "data": {"count": 10}, "shard_size": 4}


def picture(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (32, 32), i).save(buffer, "PNG")
    return buffer.getvalue()


def sample(i: int) -> Sample:
    scores = np.full((3, 64), i, np.float32)
    return Sample(f"img.{i}", picture(i), i % 3 or None, scores, np.zeros((3, 49), np.float32))


@pytest.fixture
def folder(tmp_path):
    folder = ShardFolder(str(tmp_path), HEADER)
    for index, size in enumerate(folder.sizes):
        folder.write(index, (sample(4 * index + n) for n in range(size)))
    folder.finish(batch=1, threads=1)
    return folder


def test_what_is_written_is_read(folder):
    assert folder.sizes == [4, 4, 2] and folder.complete()
    back = list(stream(folder.path))
    assert [s.id for s in back] == [f"img.{i}" for i in range(10)]
    assert [s.label for s in back] == [i % 3 or None for i in range(10)]
    assert all(s.content == picture(i) and (s.scores == i).all() for i, s in enumerate(back))
    manifest = read_manifest(folder.path)
    assert manifest["complete"] and [shard["samples"] for shard in manifest["shards"]] == [4, 4, 2]


def test_same_samples_give_same_bytes(folder, tmp_path):
    other = ShardFolder(str(tmp_path / "other"), HEADER)
    other.write(1, (sample(4 + n) for n in range(4)))
    name = "shard-000001.tar"
    assert (tmp_path / "other" / other.key / name).read_bytes() == (tmp_path / folder.key / name).read_bytes()


def damage(path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])


@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_a_damaged_shard_is_named(folder, tmp_path, how):
    damage(tmp_path / folder.key / "shard-000001.tar", how)
    assert list(folder.faults()) == [1] and folder.faults()[1].startswith(how)
    with pytest.raises(UserError, match=f"shard-000001.tar is {how}"):
        list(stream(folder.path))


def test_reading_unfinished_shards_says_so(tmp_path):
    with pytest.raises(UserError, match="scoring has not finished"):
        read_manifest(str(tmp_path))


@pytest.fixture(scope="module")
def scored(clip, tmp_path_factory):
    """Golden shards of 130 images, three shards, at the cheapest place to remove tokens."""
    split = load_split("digits", "adapt", 130)
    folder = shard_folder(clip, split, str(tmp_path_factory.mktemp("shards")), window=2, stride=2, remove_at=12)
    make_shards(clip, split, folder, quiet=True)
    return split, folder


@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_only_the_damaged_shard_is_made_again(clip, scored, capsys, how):
    from pathlib import Path

    split, folder = scored
    tars = sorted(Path(folder.path).glob("*.tar"))
    before = {tar: (tar.read_bytes(), tar.stat().st_mtime_ns) for tar in tars}
    damage(tars[1], how)
    make_shards(clip, split, folder, quiet=True)
    assert "shard-000001.tar is " + how in capsys.readouterr().err
    assert {tar: tar.read_bytes() for tar in tars} == {tar: content for tar, (content, _) in before.items()}
    assert [tar.stat().st_mtime_ns == before[tar][1] for tar in tars] == [True, False, True]


def test_nothing_is_done_twice(clip, scored, capsys):
    from pathlib import Path

    split, folder = scored
    before = {file: file.stat().st_mtime_ns for file in Path(folder.path).iterdir()}
    make_shards(clip, split, folder, quiet=True)
    assert {file: file.stat().st_mtime_ns for file in Path(folder.path).iterdir()} == before


def test_the_key_depends_on_all_that_scores_depend_on(clip, scored):
    split, folder = scored
    settings = {"window": 2, "stride": 2, "remove_at": 12}
    keys = {folder.key}
    for changes in ({"window": 4}, {"stride": 1}, {"remove_at": 4}):
        keys.add(shard_folder(clip, split, "", **{**settings, **changes}).key)
    for changed in (replace(split, templates=("{}",)), replace(split, version=2), load_split("digits", "adapt", 64)):
        keys.add(shard_folder(clip, changed, "", **settings).key)
    assert len(keys) == 7
    assert shard_folder(clip, split, "", **settings).key == folder.key


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(
    "metric, lacks, told",
    [
        ("label", {"labels": None}, r"\['label'\] need labels, and there are none; try preservation"),
        ("confidence", {"labels": None, "classes": ()}, r"\['confidence'\] need class names"),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused(clip, scored, rounds, metric, lacks, told):
    split = replace(scored[0], **lacks)
    with pytest.raises(UserError, match=told):
        shard_folder(clip, split, "", metric=metric, rounds=rounds)
    assert "preservation" in shard_folder(clip, split, "", rounds=rounds).header["metrics"]


def test_manifest_says_what_interface_promises(scored):
    split, folder = scored
    manifest = read_manifest(folder.path)
    assert manifest["metrics"] == ["label", "confidence", "preservation"] and manifest["grid"] == [8, 8]
    assert manifest["golden"] == {"window": 2, "stride": 2, "remove_at": 12, "rounds": 1}
    assert manifest["data"]["task"] == "digits" and manifest["data"]["count"] == 130
    assert manifest["shards"][0].keys() == {"file", "samples", "bytes", "sha256"}
    first = next(stream(folder.path))
    assert first.id == split.ids[0] and first.content == split.read(0) and first.label == split.labels[0]
    assert first.scores.shape == (3, 64) and first.windows.shape == (3, 16) and first.scores.dtype == np.float32


def test_shards_of_another_model_are_refused(clip, scored):
    import timm
    import torch

    from patchrank.models.clip import Clip

    torch.manual_seed(0)
    other = Clip("other", timm.create_model("patchrank_clip_digits"), clip.text)
    with pytest.raises(
        UserError, match="were computed from patchrank_clip_digits with weights .* but this model is other with \\w+$"
    ):
        read_ranked(other, scored[1].path, "preservation", 4, quiet=True)
    with pytest.raises(UserError, match="did you mean 'preservation'"):
        read_ranked(clip, scored[1].path, "preservatoin", 4, quiet=True)


def test_shards_of_another_image_size_say_which(scored):
    from patchrank.models.clip import create_clip

    larger = create_clip("patchrank_clip_digits", img_size=96)
    with pytest.raises(UserError, match="their images have 64 pixels a side, so try --img-size 64$"):
        read_ranked(larger, scored[1].path, "preservation", 4, quiet=True)


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*/*") if not file.name.startswith(".")}


@pytest.mark.slow
def test_scoring_killed_and_resumed_equals_uninterrupted(tmp_path):
    """kill -9 at a random moment after the first of four shards, then the same command again."""
    command = [sys.executable, "-m", "patchrank.golden", "--limit", "200", "--remove-at", "10", "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    whole = files(tmp_path / "whole")
    assert len(whole) == 2 * 4 + 1
    first, manifest = (next((tmp_path / "whole").glob(f"*/{n}")).stat() for n in ("shard-000000.json", "manifest.json"))
    rest = manifest.st_mtime - first.st_mtime
    for attempt in range(8):
        killed = tmp_path / f"killed-{attempt}"
        process = subprocess.Popen([*command, killed], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not list(killed.glob("*/shard-000000.json")):
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(random.random() * rest * 0.6)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not list(killed.glob("*/manifest.json")):
            break
    assert not list(killed.glob("*/manifest.json")), "never interrupted"
    subprocess.run([*command, killed], check=True, capture_output=True)
    assert files(killed) == whole


@pytest.mark.parametrize("lost", ["manifest", "agreement"])
def test_a_manifest_that_is_lost_or_disagrees_is_written_again(folder, tmp_path, lost):
    path = tmp_path / folder.key / "manifest.json"
    manifest = json.loads(path.read_text())
    if lost == "manifest":
        path.unlink()
    else:
        manifest["shards"][0]["sha256"] = "0" * 64
        path.write_text(json.dumps(manifest))
    assert not folder.faults() and not folder.complete()
    folder.finish(batch=1, threads=1)
    assert folder.complete() and len(list(stream(folder.path))) == 10


def test_no_manifest_while_a_shard_is_missing(folder, tmp_path):
    (tmp_path / folder.key / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match="some are missing or damaged"):
        folder.finish(batch=1, threads=1)
