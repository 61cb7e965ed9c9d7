"""One driver at a time on a folder, local or on S3; a killed one is in nobody's way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.s3_server import s3_server

from patchrank.io import exists, list_names, read_json, write_json
from patchrank.io.lock import find_holder, hold
from patchrank.utils.errors import UserError

ELSEWHERE = {"what": "driver", "host": "another-host", "pid": 1, "since": "2026-01-01", "token": "t"}
QUICK = {"refresh": 0.1, "stale": 0.6}  # seconds
HOLDER = """
import sys, time
from patchrank.io.lock import find_holder, hold
with hold(sys.argv[1], "sweep of the test"), hold(sys.argv[2], "sweep of the test", refresh=0.1):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture(scope="module")
def store():
    with s3_server() as store:
        yield store


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request, store, tmp_path):
    """Where a driver may work; the same promises hold on each."""
    places = {"s3": f"{store.url}/{tmp_path.name}", "memory": f"memory://{tmp_path}"}
    return places.get(request.param, str(tmp_path / "run"))


def wait_for(condition, seconds=20.0):
    """Waits until `condition()` is so, and fails if it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def note(folder):
    return read_json(f"{folder}/.driver.json")


def test_a_second_driver_is_refused_until_the_first_one_is_done(folder):
    with hold(folder, "sweep 'one'", **QUICK) as lost:
        mine = note(folder)
        assert mine["pid"] == os.getpid()
        until = time.monotonic() + 2 * QUICK["stale"]
        while time.monotonic() < until:  # for longer than a note of nobody would be respected
            with pytest.raises(UserError) as caught, hold(folder, "sweep 'two'", **QUICK):
                pytest.fail("both hold it")
        said = str(caught.value)
        assert said.startswith(f"{folder}: held by sweep 'one' (pid {os.getpid()}, host {mine['host']}, since ")
        assert "\n" not in said and note(folder)["token"] == mine["token"] and not lost.is_set()
    assert set(list_names(folder)) <= {".driver.lock"}
    with hold(folder, **QUICK):
        assert note(folder)["token"] != mine["token"]


def test_an_error_in_the_block_gives_it_back(folder):
    with pytest.raises(ZeroDivisionError), hold(folder, **QUICK):
        raise ZeroDivisionError
    assert not exists(f"{folder}/.driver.json")


@pytest.mark.slow
def test_killed_holders_are_in_nobodys_way(store, tmp_path):
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
        with hold(place, **QUICK):
            assert note(place)["pid"] == os.getpid()


@pytest.mark.parametrize("left", [ELSEWHERE, {}, [1]])
def test_a_note_that_nobody_refreshes_is_taken_over(store, capsys, left):
    folder = f"{store.url}/stale-{len(str(left))}"
    write_json(f"{folder}/.driver.json", left)
    started = time.monotonic()
    with hold(folder, **QUICK):
        assert time.monotonic() - started > QUICK["stale"]
        assert note(folder)["pid"] == os.getpid()
    assert "taking over from" in capsys.readouterr().err
    assert not exists(f"{folder}/.driver.json")


def meanwhile(act, *args):
    thread = threading.Thread(target=act, args=args, daemon=True)
    thread.start()
    return thread


def test_a_note_that_another_host_refreshes_is_respected_whatever_its_clock_says(store, capsys):
    folder, stop = f"{store.url}/elsewhere", threading.Event()
    write_json(f"{folder}/.driver.json", ELSEWHERE | {"refreshed": 0})

    def refresh():
        count = 0
        while not stop.wait(0.1):
            count += 1
            write_json(f"{folder}/.driver.json", ELSEWHERE | {"refreshed": count})  # 1970, by its own clock

    thread = meanwhile(refresh)
    try:
        with pytest.raises(UserError, match="pid 1, host another-host, since 2026-01-01"), hold(folder):
            pytest.fail("both hold it")
    finally:
        stop.set()
        thread.join()
    assert "taking over" not in capsys.readouterr().err


def test_a_note_that_is_given_back_while_we_watch_makes_room(store):
    folder, path = f"{store.url}/back", "back/.driver.json"
    write_json(f"{folder}/.driver.json", ELSEWHERE)
    store.seen.clear()

    def give_back():
        wait_for(lambda: any(method == "GET" and path in name for method, name, _ in store.seen))
        store.delete(path)

    thread = meanwhile(give_back)
    with hold(folder, refresh=0.1):
        assert note(folder)["pid"] == os.getpid()
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_come_at_once_one_gets_it(store, stale):
    """Onto an empty folder, and onto a note that all find stale at about the same time."""
    folder, got, refused, over = f"{store.url}/rush-{stale}", [], [], threading.Event()
    if stale:
        write_json(f"{folder}/.driver.json", ELSEWHERE)

    def come():
        try:
            with hold(folder, refresh=2.0, stale=3.0) as lost:
                got.append(lost)
                over.wait(20)
        except UserError:
            refused.append(1)

    threads = [meanwhile(come) for _ in range(4)]
    wait_for(lambda: len(got) + len(refused) == 4)
    over.set()
    [thread.join() for thread in threads]
    assert (len(got), len(refused)) == (1, 3)


def test_a_driver_whose_note_was_taken_over_is_told_and_leaves_the_new_one_alone(store):
    folder = f"{store.url}/lost"
    with hold(folder, **QUICK) as lost:
        store.write("lost/.driver.json", json.dumps(ELSEWHERE).encode())
        assert lost.wait(5)
    assert note(folder) == ELSEWHERE


def test_a_store_that_fails_for_a_while_costs_no_note(store):
    folder = f"{store.url}/failing"
    with hold(folder, **QUICK) as lost:
        with store.failing():
            failed = len(store.seen)
            wait_for(lambda: len(store.seen) > failed + 3)
        before = note(folder)
        wait_for(lambda: note(folder) != before)
        assert not lost.is_set()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*/file/run/.driver.lock: Not a directory"):
        with hold(str(tmp_path / "file" / "run")):
            pass


def test_whoever_looks_is_told_who_holds_a_folder_and_writes_nothing(folder):
    assert find_holder(folder) is None
    with hold(folder, "sweep 'one'", **QUICK):
        found = find_holder(folder)
        assert found.who.startswith(f"sweep 'one' (pid {os.getpid()}, ") and found.is_alive and found.idle < 10
        first = note(folder)["refreshed"]
        wait_for(lambda: note(folder)["refreshed"] > first)  # local notes are kept fresh as well
        mine = note(folder)
    assert find_holder(folder) is None
    write_json(f"{folder}/.driver.json", mine | {"refreshed": time.time() - 100})
    names, found = list_names(folder), find_holder(folder)
    assert not found.is_alive and 99 < found.idle < 110 and list_names(folder) == names


def test_a_note_of_another_host_is_watched_since_clocks_differ(folder, capsys):
    write_json(f"{folder}/.driver.json", ELSEWHERE | {"refreshed": time.time()})
    found = find_holder(folder, **QUICK)
    assert (
        not found.is_alive and found.idle is None and "watching up to 1 s for a sign of life" in capsys.readouterr().err
    )
    done = threading.Event()

    def refresh():
        n = 0
        while not done.wait(0.05):
            n += 1
            write_json(f"{folder}/.driver.json", ELSEWHERE | {"refreshed": n})  # by a clock that is years behind

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        assert find_holder(folder, refresh=0.1, stale=20.0).is_alive
    finally:
        done.set()
        thread.join()
