"""Results, shards and checkpoints on a real S3 server, which at times fails."""

import errno
import io
import os
import re
import socket
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from fsspec.config import conf
from helpers.image_files import encoded, pixels
from helpers.s3_server import SECRET, s3_server

import patchrank
from patchrank import evaluate, fit
from patchrank import io as files
from patchrank.config import ReportConfig, TrialConfig
from patchrank.data.class_names import read_vocabulary
from patchrank.data.dataset_factory import load_split
from patchrank.data.readers.wds import load_wds
from patchrank.golden import __main__ as golden
from patchrank.golden.make_shards import make_shards, shard_folder
from patchrank.golden.shards import Sample, ShardFolder, gopen, register_gopen, stream
from patchrank.io import files as whole
from patchrank.io import retry as patience
from patchrank.layers.predictors import load_predictor
from patchrank.layers.prompts import Prompts
from patchrank.models.checkpoints.load import read_checkpoint
from patchrank.models.prompt_files import describe, load_prompts, save_prompts
from patchrank.prompt import __main__ as prompt
from patchrank.report import write_report
from patchrank.trial import run as trial
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial
from patchrank.utils.command import run_command
from patchrank.utils.errors import StoreError, UserError
from patchrank.visualize import __main__ as visualize


@pytest.fixture(scope="module")
def store():
    with s3_server() as store:
        yield store


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(patience, "PAUSE", 0.05)


@pytest.fixture
def place(store, request):
    """A folder of the bucket for one test."""
    return f"{store.url}/{request.node.name.replace('[', '-').strip(']')}"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    monkeypatch.setattr(whole, "CHECK_PATIENCE", 0.3)


def key(url):
    """The name of an object in its bucket."""
    return url.removeprefix("s3://").partition("/")[2]


OPERATIONS = {
    "write": lambda url: files.write_atomic(url, b"content"),
    "write_json": lambda url: files.write_json(url, {"a": 1}),
    "read": lambda url: files.read_bytes(url),
    "read_json": lambda url: files.read_json(url),
    "exists": lambda url: files.exists(url),
    "list_names": lambda url: files.list_names(url.rpartition("/")[0]),
    "remove": lambda url: files.remove(url),
    "check_writable": lambda url: files.check_writable(url.rpartition("/")[0]),
    "local_copy": lambda url: files.local_copy(url),
}


def test_what_is_written_is_read_listed_and_removed(store, place):
    url = f"{place}/deep/er/a.json"
    assert not files.exists(url) and files.list_names(f"{place}/deep") == [] and files.read_json(url) is None
    with pytest.raises(FileNotFoundError):
        files.read_bytes(url)
    files.check_writable(place)
    assert store.keys(key(place)) == []
    files.write_json(url, {"a": [1, 2]})
    files.write_atomic(f"{place}/deep/er/b", "text")
    assert files.read_json(url) == {"a": [1, 2]} and files.read_bytes(f"{place}/deep/er/b") == b"text"
    assert files.list_names(f"{place}/deep/er") == ["a.json", "b"] and files.list_names(f"{place}/deep") == ["er"]
    files.remove(url)
    files.remove(url)
    assert not files.exists(url) and files.list_names(f"{place}/deep/er") == ["b"]


def test_what_another_process_writes_is_seen_at_once(store, place):
    assert files.list_names(place) == [] and not files.exists(f"{place}/a")
    store.write(f"{key(place)}/a", b"1")
    assert files.list_names(place) == ["a"] and files.exists(f"{place}/a")
    store.delete(f"{key(place)}/a")
    store.write(f"{key(place)}/b", b"2")
    assert not files.exists(f"{place}/a") and files.exists(f"{place}/b")
    assert files.list_names(place) == ["b"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_bears_a_store_that_fails_for_a_while(store, place, name):
    files.write_json(f"{place}/a", {})
    store.seen.clear()
    store.fail_next(2, status=503)
    OPERATIONS[name](f"{place}/a")
    assert [status for *_, status in store.seen][:2] == [503, 503] and store.seen[-1][2] < 400


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_store_that_stays_away_ends_in_one_line(store, place, name, impatient):
    with store.failing(), pytest.raises(StoreError) as caught:
        OPERATIONS[name](f"{place}/a")
    assert re.search(f" {place}[^ ]*: (The test says 500.|Internal Server Error); tried for 0 s$", str(caught.value))
    assert SECRET not in str(caught.value)


def test_whoever_waits_for_long_is_told_once(store, place, monkeypatch, capsys):
    monkeypatch.setattr(patience, "QUIET", 0.3)
    store.fail_next(4)
    files.write_atomic(f"{place}/a", b"")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{place}/a: The test says 500.; trying again for up to 60 s"
    store.fail_next(1)
    assert files.exists(f"{place}/a") and capsys.readouterr().err == ""


def test_no_bucket_and_no_access_are_told_at_once(store, place, monkeypatch):
    started = time.monotonic()
    for write in (lambda url: files.write_atomic(f"{url}/a", b""), files.check_writable):
        with pytest.raises(UserError, match="cannot write s3://no-such-bucket/.*bucket does not exist"):
            write("s3://no-such-bucket/run")
    assert files.read_json("s3://no-such-bucket/a") is None
    with store.failing(403), pytest.raises(StoreError, match=f"cannot read {place}/a: access denied"):
        files.read_bytes(f"{place}/a")
    with store.failing(403), pytest.raises(StoreError, match=f"cannot write {place}/a: access denied"):
        files.write_atomic(f"{place}/a", b"")
    assert time.monotonic() - started < 2


@pytest.fixture
def elsewhere(store, monkeypatch):
    """Sets the environment that a fresh process would read; gives it back afterwards."""
    kind = fsspec.get_filesystem_class("s3")

    def enter(**env):
        for name in store.env:
            monkeypatch.delenv(name)
        for name, value in (env | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
            monkeypatch.setenv(name, value)
        kind.clear_instance_cache()

    yield enter
    kind.clear_instance_cache()


@pytest.mark.parametrize("name", ["read_json", "exists", "write", "check_writable"])
def test_without_credentials_there_is_one_line_at_once(store, place, name, elsewhere):
    elsewhere(AWS_ENDPOINT_URL=store.env["AWS_ENDPOINT_URL"])
    with pytest.raises(StoreError, match=f" {place}.*: Unable to locate credentials; set AWS_ACCESS_KEY_ID and"):
        OPERATIONS[name](f"{place}/a")


def test_nobody_at_the_endpoint_is_one_line_after_a_while(store, place, elsewhere, impatient):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    elsewhere(**store.env | {"AWS_ENDPOINT_URL": nobody})
    with pytest.raises(StoreError) as caught:
        files.check_writable(place)
    said = f'cannot write {place}/.writable: Could not connect to the endpoint URL: "{nobody}'
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("; tried for 0 s") and SECRET not in str(caught.value)


def test_secrets_that_a_library_lets_slip_are_struck_out(store):
    error = OSError(f"no answer from http://user:{SECRET}@host/x, signed with {SECRET}")
    assert patience.reason(error) == "no answer from http://host/x, signed with ***"


class Missing(fsspec.AbstractFileSystem):
    """In place of a file system that was imported before: what fsspec does where its package is missing."""

    def __init__(self, *args, **kwargs):
        raise ImportError("Install the package to access this kind of URL")


@pytest.fixture
def forget(monkeypatch):
    """Makes fsspec find neither a package nor what it has imported from it."""
    known = {}

    def forget(kind, package):
        monkeypatch.setitem(sys.modules, package, None)
        if kind in fsspec.registry:
            known[kind] = fsspec.registry[kind]
            fsspec.register_implementation(kind, Missing, clobber=True)

    yield forget
    for kind, loaded in known.items():
        fsspec.register_implementation(kind, loaded, clobber=True)


@pytest.mark.parametrize("kind, package, extra", [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_package_is_named(forget, kind, package, extra):
    forget(kind, package)
    hint = rf"^{kind}://b/x: the package .* is missing; pip install 'patchrank-clip\[{extra}\]'$"
    with pytest.raises(UserError, match=hint):
        files.read_bytes(f"{kind}://b/x")


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA0:hid/d+en@bucket/run",
        "simplecache::s3://AKIA0:hidden@bucket/run",
        "https://host/w.pt?X-Amz-Signature=hidden&x=1",
        "s3://bucket/run?key=AKIA0&secret=hidden",
        "az://container/run?sig=hidden",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    for refuse in (files.resolve, files.read_json, files.check_writable, gopen):
        with pytest.raises(UserError, match=r"^\w+://\.\.\.: this URL carries credentials") as caught:
            refuse(url)
        assert "hid" not in str(caught.value) and "AKIA0" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/a:b@c", "sftp://me@host:22/a@b", "https://host/x?download=true"])
def test_urls_without_credentials_are_not_mistaken(url):
    assert files.resolve(url) == url


def test_a_silent_server_is_not_waited_for_for_ever(store, place, elsewhere, impatient, monkeypatch):
    """botocore sets no limit to waiting until a server says that it may send a body."""
    monkeypatch.setattr(whole, "PUT_TIMEOUT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        elsewhere(**store.env | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        started = time.monotonic()
        with pytest.raises(StoreError, match=f"cannot write {place}/a: no answer in time; tried for 0 s"):
            files.write_atomic(f"{place}/a", b"1")
        assert time.monotonic() - started < 5


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, store, place):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/a: No space left on device$"):
        files.write_atomic(tmp_path / "a", "new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_full_cache_is_told_from_a_store_that_fails(tmp_path, monkeypatch, place):
    files.write_atomic(f"{place}/w", b"x" * 100)
    monkeypatch.setenv("PATCHRANK_CACHE", str(tmp_path))

    def get_file(name, local, **how):
        with open(local, "wb") as file:
            file.write(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.filesystem_of(place)[0], "get_file", get_file)
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/fetched/.*: No space left on device$"):
        files.local_copy(f"{place}/w")
    assert not [name for *_, names in os.walk(tmp_path) for name in names]


def test_half_a_file_is_never_a_local_copy(tmp_path, monkeypatch, place):
    url, content = f"{place}/w", b"x" * 100
    files.write_atomic(url, content)
    monkeypatch.setenv("PATCHRANK_CACHE", str(tmp_path))
    filesystem, tries = files.filesystem_of(place)[0], []
    get_file = filesystem.get_file

    def slowly(name, local, **how):
        tries.append(local)
        if len(tries) < 3:
            Path(local).write_bytes(content[:50])
        if len(tries) == 1:
            raise KeyboardInterrupt
        if len(tries) == 2:  # another process, which began later and is done first
            assert Path(files.local_copy(url)).read_bytes() == content
        get_file(name, local, **how)

    monkeypatch.setattr(filesystem, "get_file", slowly)
    with pytest.raises(KeyboardInterrupt):
        files.local_copy(url)
    copy = Path(files.local_copy(url))
    assert copy.read_bytes() == content and os.listdir(copy.parent) == ["w"] and len(tries) == 3
    assert files.local_copy(url) == str(copy) and len(tries) == 3


# --- streaming


def sample(i):
    return Sample(f"s{i}", encoded(pixels(seed=i)), i, np.full((1, 4), i, np.float32), np.zeros((1, 2), np.float32))


@pytest.fixture
def shards(place):
    folder = ShardFolder(place, {"schema": 1, "data": {"count": 8}, "shard_size": 2})
    for index in range(4):
        folder.write(index, (sample(2 * index + n) for n in range(2)))
    folder.finish(batch=1, threads=1)
    return folder


def labels(urls, **how):
    dataset = webdataset.WebDataset(urls, shardshuffle=False, **how)
    return [int(member["cls"]) for member in dataset]


def test_anybodys_webdataset_reads_our_shards(store, shards):
    register_gopen()
    urls = f"{shards.path}/shard-{{000000..000003}}.tar"
    store.fail_next(2)
    assert labels(urls) == list(range(8)) == [each.label for each in stream(shards.path)]
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    workers = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(int(member["cls"]) for member in workers) == list(range(8))


@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_a_damaged_shard_is_never_read_as_a_short_one(store, shards, how):
    register_gopen()
    name = f"{key(shards.path)}/shard-000001.tar"
    content = store.read(name)
    at_a_member = content.index(b"00000003.png") // 512 * 512  # where tarfile and WebDataset see nothing wrong
    assert list(shards.faults()) == []
    if how == "missing":
        store.delete(name)
    else:
        store.write(name, content[:at_a_member] if how == "truncated" else content[:-1] + b"\1")
    with pytest.raises(UserError, match=f"shard s3://.*shard-000001.tar is {how}"):
        labels(f"{shards.path}/shard-{{000000..000003}}.tar")
    with pytest.raises(UserError, match=f"shard s3://.*shard-000001.tar is {how}"):
        list(stream(shards.path))
    assert list(shards.faults()) == [1] and shards.faults()[1].startswith(how)


def test_a_shard_is_not_fetched_twice_to_be_checked(store, shards):
    shards.faults()
    store.seen.clear()
    assert shards.complete()
    assert not [path for method, path, _ in store.seen if method == "GET" and path.endswith(".tar")]


def test_tars_without_a_record_are_read_and_written_too(store, place):
    register_gopen()
    with webdataset.ShardWriter(f"{place}/%d.tar", maxcount=2, verbose=0) as writer:
        for n in range(3):
            writer.write({"__key__": f"{n}", "cls": n})
    assert labels(f"{place}/{{000000..000001}}.tar".replace("00000", "")) == [0, 1, 2]


def test_pipes_are_refused(tmp_path):
    for read in (lambda url: list(stream(url)), gopen, files.read_bytes):
        with pytest.raises(UserError, match="pipe: would run a shell command"):
            read(f"pipe:touch {tmp_path}/ran")
    assert os.listdir(tmp_path) == []


def test_images_in_tars_and_folders_on_a_store_that_fails_at_times(store, place):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for n in range(6):
            for name, content in ((f"{n}.cls", str(n % 2).encode()), (f"{n}.png", encoded(pixels(seed=n)))):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
                if name.endswith("png"):
                    store.write(f"{key(place)}/folder/{'ab'[n % 2]}/{name}", content)
    store.write(f"{key(place)}/tars/a.tar", buffer.getvalue())
    for load in (
        lambda: load_wds("wds", "all", f"{place}/tars"),
        lambda: load_split("folder", "all", None, f"{place}/folder"),
    ):
        store.fail_next(1)
        split = load()
        assert sorted(split.labels) == [0, 0, 0, 1, 1, 1]
        store.fail_next(1)
        assert split.content(0) == encoded(pixels(seed=0))


# --- models and reports


def test_checkpoints_predictors_and_prompts_are_read_from_urls(store, place, clip, tmp_path, monkeypatch):
    shipped = os.path.join(os.path.dirname(patchrank.__file__), "models", "weights")
    (pair,) = [name for name in os.listdir(shipped) if "predictor" not in name]
    with open(f"{shipped}/{pair}", "rb") as file:
        content = file.read()
    monkeypatch.setenv("PATCHRANK_CACHE", str(tmp_path / "cache"))
    store.write(f"{key(place)}/pair.safetensors", content)
    store.fail_next(2)
    loaded = patchrank.create_clip("patchrank_clip_digits", checkpoint=f"{place}/pair.safetensors")
    assert loaded.sha256() == clip.sha256()
    fetched = store.counts("GET")
    read_checkpoint(f"{place}/pair.safetensors")
    assert store.counts("GET") == fetched  # once
    store.write(f"{key(place)}/pair.safetensors", content[:-4])
    with pytest.raises(UserError, match=f"checkpoint {place}/pair.safetensors: damaged"):
        read_checkpoint(f"{place}/pair.safetensors")  # another version is another file
    with pytest.raises(UserError, match=f"checkpoint {place}/none.pt: there is no such file"):
        read_checkpoint(f"{place}/none.pt")

    prompts = Prompts("V", 2, 64, 64, seed=0)
    save_prompts(prompts, f"{place}/prompts.safetensors", describe(clip))
    assert load_prompts(f"{place}/prompts.safetensors")[0].sha256() == prompts.sha256()
    assert patchrank.create_clip("patchrank_clip_digits", prompts=f"{place}/prompts.safetensors").prompts is not None
    clip.set_prompts(None)
    with pytest.raises(UserError, match=f"predictor file {place}/none.safetensors: cannot be read"):
        load_predictor(f"{place}/none.safetensors")
    store.write(f"{key(place)}/names.yaml", b"classes: [zero, one]\n")
    assert read_vocabulary(f"{place}/names.yaml").classes == ("zero", "one")


# --- resuming


def test_golden_shards_on_a_store_are_made_once_and_mended_one_by_one(clip, store, place, capsys, monkeypatch):
    monkeypatch.setattr("patchrank.golden.make_shards.SHARD_SIZE", 4)
    split = load_split("digits", "adapt", 10)
    folder = shard_folder(clip, split, place, window=2, stride=2, remove_at=12)
    make_shards(clip, split, folder, quiet=True)
    first = {name: store.read(name) for name in store.keys(key(place))}
    assert len(first) == 2 * 3 + 1
    store.seen.clear()
    make_shards(clip, split, folder, quiet=True)
    assert store.counts("PUT") == 0
    tars = [f"{key(folder.path)}/shard-00000{n}.tar" for n in range(3)]
    store.delete(tars[1])
    store.write(tars[2], first[tars[2]][:1024])
    store.seen.clear()
    make_shards(clip, split, folder, quiet=True)
    written = {path for method, path, _ in store.seen if method == "PUT"}
    assert {path for path in written if path.endswith(".tar")} == {f"/{store.bucket}/{name}" for name in tars[1:]}
    assert {name: store.read(name) for name in store.keys(key(place))} == first
    said = capsys.readouterr().err
    assert "shard-000001.tar is missing" in said and "shard-000002.tar is truncated: 1024 of" in said


BASE = {
    "data": {"tasks": ["digits"], "n_train": 16, "n_val": 8, "n_test": 12},
    "golden": {"stride": 2, "remove_at": 12},
    "predictor": {"epochs": 1, "dim": 8},
    "pruning": {"locations": [12], "keep_rate": 0.6},
}


CHEAP = ("--remove-at", "12", "--stride", "2")


@pytest.mark.slow
def test_a_trial_on_a_store_goes_on_from_what_is_there(store, place, impatient, monkeypatch):
    config, root, shards = TrialConfig.model_validate(BASE), f"{place}/run", f"{place}/shards"
    inputs = load_inputs(config.model, config.data, heads=f"{shards}/heads")

    def run():
        store.seen.clear()
        own = load_inputs(config.model, config.data, heads=f"{shards}/heads")
        record = trial.run_trial(ResolvedTrial(config), own, root, shards, "s", quiet=True)
        return record, sorted({path.split("/")[3] for method, path, _ in store.seen if method == "PUT"})

    record, written = run()
    assert written == ["run", "shards"] and files.read_json(f"{root}/trials/{record['id']}.json") == record
    store.delete(f"{key(root)}/trials/{record['id']}.json")
    again, written = run()  # the record alone is missing
    assert written == ["run"] and again["metrics"] == record["metrics"]
    report = write_report([again], root, ReportConfig(table="t"), ["pruning.keep_rate"], "s")
    assert report.path == f"{root}/report.md" and "t-accuracy.png" in files.list_names(root)
    for name in store.keys(key(place)):
        assert SECRET.encode() not in store.read(name)
    with store.failing(only="/predictors/"), pytest.raises(StoreError, match="^cannot read s3://.*/shards/predictors/"):
        trial.run_trial(
            ResolvedTrial(config), inputs, root, shards, "s", quiet=True
        )  # and not: one that is fitted anew
    assert files.list_names(f"{root}/trials") == [f"{record['id']}.json", f"{record['id']}.npz"]


def test_stages_read_from_a_store_and_write_to_it_and_tell_nobody_its_secret(store, place, capsys):
    """Each goes through a server that fails for two requests as it begins."""

    def run(main, *args):
        store.fail_next(2)
        main([str(arg) for arg in args])
        assert store.takes() is None  # it did ask
        return capsys.readouterr()

    few = ("--limit", 10)
    scored = [run(golden.main, *few, "--split", split, *CHEAP, "--out", place) for split in ("adapt", "val")]
    train, val = (said.out.strip() for said in scored)
    fitting = ("--shards", train, "--val-shards", val, "--epochs", 1, "--dim", 8)
    saids = [*scored, run(fit.main, *fitting, "--out", f"{place}/predictor.safetensors")]
    pruned = ("--keep-rate", 0.5, "--predictor", f"{place}/predictor.safetensors", "--locations", 4)
    tuning = ("--mode", "V", "--epochs", 1, "--shots", 1, "--out", f"{place}/prompts.st")
    saids += [run(prompt.main, *few, *pruned, *tuning)]
    saids += [run(evaluate.main, *few, *pruned, "--shards", val, "--out", f"{place}/row.json")]
    saids += [run(evaluate.main, *few, *pruned, "--prompts", f"{place}/prompts.st")]
    drawing = ("--data", "digits", "--limit", 1, "--rank", "random", "--keep-rates", 0.5)
    saids += [run(visualize.main, *drawing, "--out", f"{place}/picture.png")]
    assert {"picture.png", "predictor.safetensors", "prompts.st", "row.json"} <= set(files.list_names(place))
    assert "matching_rate" in files.read_json(f"{place}/row.json")
    assert not any(SECRET in said.out + said.err for said in saids)
    with store.failing(403), pytest.raises(SystemExit) as caught:
        run_command(lambda: golden.main(["--limit", "10", *CHEAP, "--out", place]))
    assert caught.value.code == 2 and capsys.readouterr().err.startswith(f"error: cannot read {place}/")


def test_users_own_settings_of_botocore_win(monkeypatch):
    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 7, "s3": {"addressing_style": "path"}}})
    about = files.filesystem_of("s3://bucket/a")[0].config_kwargs
    assert about["read_timeout"] == 7 and about["s3"] == {"addressing_style": "path"} and about["connect_timeout"] == 10
