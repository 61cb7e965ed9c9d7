"""One driver at a time on a folder, local or on S3; a killed one is in nobody's way."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock
from helpers.s3_server import s3_server

from patchrank.io import exists, list_names, read_json, write_json
from patchrank.io import lock as lease
from patchrank.io.lock import hold
from patchrank.utils.errors import UserError

ELSEWHERE = {"what": "driver", "host": "another-host", "pid": 1, "machine": "m", "since": "2026-01-01", "token": "t"}
HOLDER = """
import sys, time
from patchrank import lease
lease.RENEW = 0.2
with lease.hold(sys.argv[1], "sweep of the test"), lease.hold(sys.argv[2], "sweep of the test"):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture(scope="module")
def store():
    with s3_server() as store:
        yield store


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"RENEW": 0.2, "STALE": 1.0, "SETTLE": 0.8, "POLL": 0.05}.items():
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture(params=["local", "s3", "memory", "without flock"])
def folder(request, store, tmp_path, monkeypatch):
    """Where a driver may work; the same promises hold on each."""
    if request.param == "without flock":

        class Unlockable(FileLock):
            def acquire(self, *args, **kwargs):
                raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(lease, "FileLock", Unlockable)
    places = {"s3": f"{store.url}/{tmp_path.name}", "memory": f"memory://{tmp_path}"}
    return places.get(request.param, str(tmp_path / "run"))


def note(folder):
    return read_json(f"{folder}/.driver.json")


def test_a_second_driver_is_refused_until_the_first_one_is_done(folder):
    with hold(folder, "sweep 'one'") as held:
        mine = note(folder)
        assert mine["pid"] == os.getpid() and held.folder == folder
        with pytest.raises(UserError) as caught, hold(folder, "sweep 'two'"):
            pytest.fail("both hold it")
        assert str(caught.value).startswith(f"{folder}: held by sweep 'one' (pid {os.getpid()}, host {mine['host']}, ")
        assert "\n" not in str(caught.value)
        time.sleep(1.2 * lease.STALE)  # however long it takes
        assert note(folder)["token"] == mine["token"] and not held.lost.is_set()
    assert set(list_names(folder)) <= {".driver.lock"}
    with hold(folder):
        pass


def test_an_error_in_the_block_gives_it_back(folder):
    with pytest.raises(ZeroDivisionError), hold(folder):
        raise ZeroDivisionError
    with hold(folder):
        assert not note(folder).get("lost")


@pytest.mark.slow
def test_killed_holders_are_in_nobodys_way(store, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE", 30.0)  # far longer than a lock of this machine takes to be free
    places = [str(tmp_path), f"{store.url}/killed"]
    process = subprocess.Popen([sys.executable, "-c", HOLDER, *places], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        for place in places:
            with pytest.raises(UserError, match=f"held by sweep of the test \\(pid {process.pid}, host "), hold(place):
                pytest.fail("both hold it")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for place in places:
        assert note(place)["pid"] == process.pid  # nobody tidied up
        started = time.monotonic()
        with hold(place):
            assert note(place)["pid"] == os.getpid()
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("left", [ELSEWHERE, {}, [1]])
def test_a_lease_that_nobody_renews_is_taken_over(store, capsys, left):
    folder = f"{store.url}/stale-{len(str(left))}"
    write_json(f"{folder}/.driver.json", left)
    started = time.monotonic()
    with hold(folder):
        assert lease.STALE < time.monotonic() - started < lease.STALE + 3
        assert note(folder)["pid"] == os.getpid()
    assert "taking over from" in capsys.readouterr().err
    assert not exists(f"{folder}/.driver.json")


def meanwhile(act, *args):
    thread = threading.Thread(target=act, args=args, daemon=True)
    thread.start()
    return thread


def test_a_lease_that_another_host_renews_is_respected_whatever_its_clock_says(store, capsys):
    folder, stop = f"{store.url}/elsewhere", threading.Event()
    write_json(f"{folder}/.driver.json", ELSEWHERE | {"renewed": 0})

    def renew():
        count = 0
        while not stop.wait(0.3):
            count += 1
            write_json(f"{folder}/.driver.json", ELSEWHERE | {"renewed": count})  # 1970, by its own clock

    thread = meanwhile(renew)
    try:
        with pytest.raises(UserError, match="pid 1, host another-host, since 2026-01-01"), hold(folder):
            pytest.fail("both hold it")
    finally:
        stop.set()
        thread.join()
    assert "taking over" not in capsys.readouterr().err


def test_a_lease_that_is_given_back_while_we_watch_is_ours(store):
    folder = f"{store.url}/back"
    write_json(f"{folder}/.driver.json", ELSEWHERE)
    thread = meanwhile(lambda: (time.sleep(0.4), store.delete("back/.driver.json")))
    with hold(folder):
        assert note(folder)["pid"] == os.getpid()
    thread.join()


def test_of_many_that_come_at_once_one_gets_it(store, monkeypatch):
    """Onto an empty folder, and onto a stale lease, where all see at the same time that nobody renews it."""
    watched, all_saw = lease._watched, threading.Barrier(4)

    def watch(folder, theirs):
        found = watched(folder, theirs)
        if theirs == ELSEWHERE:
            time.sleep(0.1 * all_saw.wait(10))  # each has time to write and to find its own lease there
        return found

    monkeypatch.setattr(lease, "_watched", watch)
    for folder, stale in ((f"{store.url}/rush", False), (f"{store.url}/rush-stale", True)):
        if stale:
            write_json(f"{folder}/.driver.json", ELSEWHERE)
        got, refused, over = [], [], threading.Event()

        def come(folder=folder, got=got, refused=refused, over=over):
            try:
                with hold(folder):
                    got.append(1)
                    over.wait(20)
            except UserError:
                refused.append(1)

        threads = [meanwhile(come) for _ in range(4)]
        until = time.monotonic() + 20
        while len(got) + len(refused) < 4 and time.monotonic() < until:
            time.sleep(0.05)
        over.set()
        [thread.join() for thread in threads]
        assert (len(got), len(refused)) == (1, 3)


def test_whoever_lost_a_lease_is_told_and_leaves_the_new_one_alone(store, capsys):
    folder = f"{store.url}/lost"
    with hold(folder) as held:
        store.write("lost/.driver.json", json.dumps(ELSEWHERE).encode())
        assert held.lost.wait(5)
    assert note(folder) == ELSEWHERE
    assert "another driver has taken it over" in capsys.readouterr().err


def test_a_store_that_fails_for_a_while_costs_no_lease(store):
    folder = f"{store.url}/failing"
    with hold(folder) as held:
        before = note(folder)
        with store.failing():
            time.sleep(1)
        until = time.monotonic() + 10
        while note(folder) == before and time.monotonic() < until:
            time.sleep(0.1)
        assert note(folder)["renewed"] > before["renewed"] and not held.lost.is_set()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*/file/run/.driver.lock: Not a directory"):
        with hold(str(tmp_path / "file" / "run")):
            pass
