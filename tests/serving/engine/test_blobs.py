"""Files that outlive a process: whole or not there, bounded, never trusted."""

import os
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from dsv4_jax.serving.engine.blobs import BlobStore, check_folder

ROOM = 1 << 20


@pytest.fixture
def opened(tmp_path):
    stores = []

    def open_store(capacity=ROOM, fingerprint="model"):
        events = Counter()
        store = BlobStore(tmp_path / "disk", fingerprint, capacity, lambda e: events.update([e]))
        store.events = events
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        if not store._closing:
            store.close()


def fill(store, *names, size=1000):
    for number, name in enumerate(names):
        assert store.put(name, {"n": number}, [np.full(size, number, np.uint8), b"end"])
    assert store.flush(10)


def files_of(store):
    return [path for path in store.folder.glob("*/*/*") if path.is_file()]


def test_what_was_put_is_there_after_a_restart(opened):
    store = opened()
    fill(store, "one", "two")
    store.close()
    store = opened()
    assert sorted(store.names()) == ["one", "two"]
    meta, payload = store.get("two")
    assert meta == {"n": 1} and bytes(payload) == b"\1" * 1000 + b"end"
    assert store.get("three") is None and not store.has("three")


@pytest.mark.parametrize("place", [0, 13, 40, 700, -1])
def test_a_flipped_bit_is_found_anywhere(opened, place):
    store = opened()
    fill(store, "one")
    [path] = files_of(store)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    assert store.get("one") is None and not path.exists()
    assert store.events["corrupt"] == 1 and store.used == 0
    fill(store, "one")
    assert store.get("one") is not None


@pytest.mark.parametrize("size", [0, 5, 20, 500, 1])
def test_a_file_cut_short_counts_as_none(opened, size):
    store = opened()
    fill(store, "one")
    [path] = files_of(store)
    os.truncate(path, size)
    assert store.get("one") is None and store.events["corrupt"] == 1


def test_a_file_under_another_name_or_of_another_model_counts_as_none(opened):
    store = opened()
    fill(store, "one", "two")
    one, two = (store.folder / store._path(name) for name in ("one", "two"))
    two.write_bytes(one.read_bytes())
    assert store.get("two") is None and store.events["corrupt"] == 1
    store.close()
    other = opened(fingerprint="other")
    assert other.get("one") is None and other.names() == [] and other.used > 0


def test_the_least_recently_used_go_first_across_models_and_restarts(opened):
    store = opened(fingerprint="old")
    fill(store, "aaa", "bbb")
    assert store.get("aaa") is not None
    for number, name in enumerate(("bbb", "aaa")):
        os.utime(store.folder / store._path(name), (number, number))
    store.close()
    store = opened(capacity=3500)
    fill(store, "ccc", "ddd")
    assert store.events["evict"] == 1 and len(files_of(store)) == 3 and store.used <= 3500
    store.close()
    assert opened(fingerprint="old").names() == ["aaa"]


def test_files_and_folder_may_be_deleted_at_any_time(opened):
    store = opened()
    fill(store, "one", "two")
    for path in files_of(store):
        path.unlink()
    assert store.get("one") is None
    for folder in store.folder.glob("*/*"):
        folder.rmdir()
    fill(store, "three")
    assert store.get("three") is not None and "corrupt" not in store.events


def test_an_unfinished_file_is_removed(opened):
    store = opened()
    fill(store, "one")
    [path] = files_of(store)
    store.close()
    path.with_name("abc.part").write_bytes(b"half")
    assert opened().names() == ["one"] and not path.with_name("abc.part").exists()


def test_a_full_disk_costs_the_file_and_nothing_else(opened, monkeypatch):
    store = opened()

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    fill(store, "one")
    assert store.events == {"error": 1} and not store.has("one") and store.used == 0
    monkeypatch.undo()
    fill(store, "one")
    assert store.has("one")


def test_more_than_the_backlog_is_refused(opened, monkeypatch):
    monkeypatch.setattr("dsv4_jax.serving.engine.blobs.BACKLOG_BYTES", 2000)
    store, go = opened(), threading.Event()
    write = store._write
    monkeypatch.setattr(store, "_write", lambda *a: (go.wait(10), write(*a))[1])
    assert store.put("one", {}, [b"x" * 1500]) and not store.is_ready
    assert not store.put("two", {}, [b"x" * 1500]) and store.events["refuse"] == 1
    assert store.put("one", {}, [b"x" * 1500]), "it is on its way already"
    go.set()
    assert store.flush(10) and store.is_ready and store.names() == ["one"]


def test_two_processes_do_not_share_a_folder(opened, tmp_path):
    opened()
    with pytest.raises(ValueError, match="in use by another process"):
        check_folder(tmp_path / "disk")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot use"):
        check_folder(tmp_path / "file" / "disk")
    check_folder(tmp_path / "new")


WRITER = """
import sys
import numpy as np
from dsv4_jax.serving.engine.blobs import BlobStore
store, number = BlobStore(sys.argv[1], "model", 1 << 22), 0
print("open", flush=True)
while True:
    name = f"n-{number % 400}"
    blob = store.get(name)
    if blob is None:
        store.put(name, {"n": number % 400}, [np.full(30_000, number % 400 % 251, np.uint8)])
    elif set(blob.payload) != {blob.meta["n"] % 251} or len(blob.payload) != 30_000:
        print("WRONG", flush=True)
    number += 1
"""


def test_killed_while_it_writes_and_reads(opened, tmp_path):
    """What a killed process leaves is whole or not there."""
    for attempt in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "disk")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None and writer.stdout.readline() == "open\n"
        threading.Event().wait(0.02 + 0.013 * attempt)
        writer.kill()
        assert "WRONG" not in writer.stdout.read()
        writer.stdout.close()
        writer.wait()
        store = opened(capacity=1 << 22)
        for name in store.names():
            blob = store.get(name)
            assert blob is not None and len(blob.payload) == 30_000
            assert set(blob.payload) == {blob.meta["n"] % 251}
        assert store.events["corrupt"] == 0 and not list(store.folder.glob("*/*/*.part"))
        store.close()


def test_what_begins_so_can_be_removed_whether_written_or_not(opened, monkeypatch):
    store = opened()
    fill(store, "p-one", "r-two")
    gate, begun = threading.Event(), threading.Event()
    write = store._write

    def slowly(*job):
        begun.set()
        assert gate.wait(10)
        return write(*job)

    monkeypatch.setattr(store, "_write", slowly)
    for name in ("p-three", "p-four", "r-five"):
        assert store.put(name, {}, [b"x"])
    assert begun.wait(10)
    clearing = threading.Thread(target=store.clear, args=(("p-", "c-"),))
    clearing.start()
    gate.set()
    clearing.join(10)
    assert store.flush(10)
    assert sorted(store.names()) == ["r-five", "r-two"] and not store.has("p-four")
    assert len(files_of(store)) == 2
