import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from patchrank.config import GoldenConfig
from patchrank.data.dataset_factory import load_split
from patchrank.data.image_split import Reader
from patchrank.golden import __main__ as command
from patchrank.golden import batch_size, make_shards, precision, suffix
from patchrank.golden.scores import GoldenScores
from patchrank.golden.shards import read_manifest
from patchrank.utils.errors import UserError

CHEAP = {"window": 2, "stride": 2, "remove_at": 12}
FLAGS = ["--limit", "2", "--stride", "2", "--remove-at", "12", "--out"]


def test_a_cpu_gets_what_fits_its_caches(tower, monkeypatch):
    count = batch_size.batch_size_of(tower, 4, 2)
    one = 61 * 256 * 4  # a sequence's activations inside the MLP
    assert count * one <= batch_size.CPU_BYTES < (count + 1) * one
    monkeypatch.setattr(batch_size, "CPU_BYTES", 1)
    assert batch_size.batch_size_of(tower, 4, 2) == batch_size.CPU_LEAST


@pytest.mark.parametrize("total, expected", [(1, 1), (1000, 25), (10**9, batch_size.MOST)])
def test_a_gpu_gets_a_quarter_of_its_memory_whatever_lies_there(monkeypatch, total, expected):
    weights = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    tower = SimpleNamespace(pos_embed=weights, num_leading_tokens=1, num_patches=64, embed_dim=64, blocks=[None] * 12)
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, total))
    monkeypatch.setattr(batch_size, "memory_of", lambda tower, layer, count, length: asked.append(count) or 10 * count)
    monkeypatch.setattr(batch_size, "_MEASURED", {})
    assert [batch_size.batch_size_of(tower, 4, 2) for _ in range(2)] == [expected] * 2
    assert len(asked) == 1


@pytest.fixture
def split(monkeypatch):
    """Six images in three shards, decoded by threads as photographs are."""
    monkeypatch.setattr(make_shards, "SHARD_SIZE", 2)
    return replace(load_split("digits", "val", 6), drawn=False)


def reading(split, fetch):
    """The split with another way to read image i."""
    return replace(split, read=Reader(lambda i: fetch(i, split.read(i)), range(len(split))))


def shards_of(clip, split, tmp_path):
    return make_shards.shard_folder(clip, split, str(tmp_path), **CHEAP)


@pytest.mark.parametrize("given", [None, 5])
def test_the_manifest_says_how_many_ran_at_a_time(clip, split, tmp_path, given):
    path = make_shards.make_shards(clip, split, shards_of(clip, split, tmp_path), given, quiet=True)
    manifest = read_manifest(path)
    assert manifest["batch"] == (given or batch_size.batch_size_of(clip.visual, 12, 2)) and "compile" not in manifest


def test_a_broken_image_stops_its_own_shard_alone(clip, split, tmp_path):
    broken = reading(split, lambda i, content: b"no image" if i == 3 else content)
    folder = shards_of(clip, broken, tmp_path)
    with pytest.raises(UserError, match=f"image {split.ids[3]} cannot be decoded"):
        make_shards.make_shards(clip, broken, folder, quiet=True)
    assert list(folder.faults()) == [1, 2]


def test_the_next_shard_is_read_meanwhile_and_no_other(clip, split, tmp_path, monkeypatch):
    seen, next_is_there = set(), threading.Event()

    def fetch(i, content):
        seen.add(i)
        if i == 3:
            next_is_there.set()
        return content

    def score_images(tower, images, *args, metrics, **settings):
        assert next_is_there.wait(20) and (done or not seen & {4, 5})
        done.append(len(images))
        return GoldenScores(torch.zeros(len(images), len(metrics), 64), torch.zeros(len(images), len(metrics), 16))

    done = []
    monkeypatch.setattr(make_shards, "score_images", score_images)
    watched = reading(split, fetch)
    make_shards.make_shards(clip, watched, shards_of(clip, watched, tmp_path), quiet=True)
    assert done == [2, 2, 2] and seen == set(range(6))


def clock(*seconds):
    """In place of `time`: runs take so many seconds, one after the other; no more runs may follow."""
    ticks = iter([tick for length in seconds for tick in (0.0, length)])
    return SimpleNamespace(perf_counter=lambda: next(ticks))


@pytest.mark.parametrize(
    "seconds, least_tau, told",
    [
        ((1, 1, 3, 2), 0.5, "1.50 times as fast, .* scores are made with$"),
        ((1, 1, 2.1, 2), 0.5, "1.05 times as fast, .* scores are made without$"),
        ((1, 1, 3, 2), 1.01, "at least 1.1 and 1.01 are wanted.; scores are made without$"),
        ((1, 300), 0.5, "one layer takes 300 times as long; scores are made without$"),
    ],
)
def test_autocast_is_used_where_it_is_faster_and_ranks_alike(clip, monkeypatch, capsys, seconds, least_tau, told):
    monkeypatch.setattr(precision, "time", clock(*seconds))
    monkeypatch.setattr(precision, "LEAST_TAU", least_tau)
    split, golden = load_split("digits", "val", 2), GoldenConfig(stride=2)
    assert precision.autocast_pays(clip, split, golden, "bf16") == told.endswith("with$")
    assert re.search(told, capsys.readouterr().err.strip())


HALVED = ["--autocast", "bf16"]


def test_shards_say_that_autocast_was_used_and_never_mix(clip, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "autocast_pays", lambda *args: asked.append(args) or len(asked) > 1)
    paths = []
    for root, flags in ((1, []), (1, HALVED), (2, HALVED), (2, HALVED), (3, HALVED), (3, HALVED)):
        command.main([*FLAGS, str(tmp_path / str(root)), *flags])
        paths.append(capsys.readouterr().out.strip())
    plain, begun_without, refused, goes_on, used, again = paths
    assert plain == begun_without and refused == goes_on and used == again and len(asked) == 2  # what was begun goes on
    assert plain.split("/")[-1] == refused.split("/")[-1] != used.split("/")[-1]
    assert "autocast" not in read_manifest(plain) and read_manifest(used)["autocast"] == "bf16"


def test_layers_that_cannot_be_compiled_are_told_in_one_line(clip, split, tmp_path, monkeypatch):
    kind = type("InductorError", (RuntimeError,), {"__module__": "torch.somewhere"})

    def compile(*args, **settings):
        def run(*args):
            raise kind("no compiler\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

        return run

    monkeypatch.setattr(torch, "compile", compile)
    suffix.compiled.cache_clear()
    folder = shards_of(clip, split, tmp_path)
    with pytest.raises(UserError, match=r"cannot compile the layers here \(no compiler\); try to leave it out$"):
        make_shards.make_shards(clip, split, folder, quiet=True, compile=True)
    suffix.compiled.cache_clear()
    assert not list(tmp_path.iterdir())
