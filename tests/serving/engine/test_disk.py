"""Prefixes that outlive the engine: the same bits, whatever happened to the files."""

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine import disk
from dsv4_jax.serving.engine.loop import DiskCache
from dsv4_jax.serving.engine.request import Status
from tests.serving.engine.conftest import forget_prefixes, metric, settled
from tests.serving.engine.test_reuse import LENGTHS, ask, make_prompt

ROOM = 256 << 20


@contextmanager
def with_disk(engine, folder, capacity=ROOM):
    """The engine as if it had just been started with this folder."""
    forget_prefixes(engine)
    with settled(engine):
        engine.disk = engine._open_disk(DiskCache(str(folder), capacity), "test")
    try:
        yield
        with settled(engine):
            engine.disk.finish(30)
    finally:
        tier, engine.disk = engine.disk, None
        engine.scheduler.cache.on_attach = lambda node: None
        tier.close()
        forget_prefixes(engine)


def events(engine):
    found = {}
    for line in engine.metrics.text().decode().splitlines():
        if line.startswith("dsv4:disk_cache_events_total{"):
            name = line.split('event="')[1].split('"')[0]
            found[name] = found.get(name, 0) + float(line.rsplit(" ", 1)[1])
    return found


def files_of(folder):
    return sorted(path for path in folder.glob("*/*/*") if path.is_file())


@pytest.fixture(scope="module")
def cold(engine):
    """What is right, for every length, computed from the first token."""
    forget_prefixes(engine)
    whole = make_prompt(0, LENGTHS[-1])
    return {n: ask(engine, whole[:n], tenant=f"alone {n}")[0] for n in LENGTHS}


def test_after_a_restart_prompts_resume_exactly(engine, cold, tmp_path):
    whole = make_prompt(0, LENGTHS[-1])
    with with_disk(engine, tmp_path):
        for length in LENGTHS:
            assert ask(engine, whole[:length])[0] == cold[length]
    hits = events(engine).get("hit", 0)
    with with_disk(engine, tmp_path):
        for length in reversed(LENGTHS):
            tokens, cached = ask(engine, whole[:length])
            assert tokens == cold[length] and cached == (length - 1) // 128 * 128
            assert ask(engine, whole[:length], tenant=f"other {length}")[1] == 0
            forget_prefixes(engine)
        assert events(engine)["hit"] == hits + sum(n > 128 for n in LENGTHS)
        assert engine.host.staged == 0
    assert metric(engine, "compilations_after_ready_total") == 0


def test_what_memory_has_is_not_read(engine, cold, tmp_path):
    whole = make_prompt(0, 700)
    with with_disk(engine, tmp_path):
        ask(engine, whole)
        before = events(engine)
        assert ask(engine, whole)[1] == 640
        assert events(engine).get("hit", 0) == before.get("hit", 0)


def test_damaged_files_are_computed_again(engine, cold, tmp_path):
    whole, rng = make_prompt(0, 700), random.Random(3)
    with with_disk(engine, tmp_path):
        ask(engine, whole)
    assert len(files_of(tmp_path)) >= 6
    for attempt in range(24):
        corrupt = events(engine).get("corrupt", 0)
        chosen = rng.sample(files_of(tmp_path), 2)
        for path in chosen:
            data = bytearray(path.read_bytes())
            if attempt % 3 == 0:
                path.unlink()
            elif attempt % 3 == 1:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                path.write_bytes(data)
            else:
                os.truncate(path, rng.randrange(len(data)))
        with with_disk(engine, tmp_path):
            tokens, cached = ask(engine, whole)
            assert tokens == cold[700] and cached % 128 == 0
        if attempt % 3:
            assert corrupt < events(engine)["corrupt"] <= corrupt + 2
        for _ in range(2):  # what was computed again was written again, each time up to one file
            with with_disk(engine, tmp_path):
                tokens, cached = ask(engine, whole)
        assert (tokens, cached) == (cold[700], 640)


def test_a_folder_that_is_removed_costs_time_only(engine, cold, tmp_path):
    whole = make_prompt(0, 700)
    with with_disk(engine, tmp_path / "disk"):
        ask(engine, whole)
        with settled(engine):
            engine.disk.finish(30)
            engine.disk.store.flush(30)
        for path in files_of(tmp_path / "disk"):
            path.unlink()
        forget_prefixes(engine)
        tokens, cached = ask(engine, whole)
        assert (tokens, cached) == (cold[700], 0)


def test_little_room_keeps_what_can_be_used(engine, cold, tmp_path):
    """Beginnings stay longer than what needs them."""
    whole = make_prompt(0, 700)
    with with_disk(engine, tmp_path, capacity=1 << 17):
        for length in (257, 700):
            assert ask(engine, whole[:length])[0] == cold[length]
        with settled(engine):
            engine.disk.finish(30)
            engine.disk.store.flush(30)
        assert engine.disk.store.used <= 1 << 17
    with with_disk(engine, tmp_path, capacity=1 << 17):
        assert ask(engine, whole)[0] == cold[700]


def test_a_slow_disk_does_not_hold_a_request_for_ever(engine, cold, tmp_path, monkeypatch):
    whole = make_prompt(0, 700)
    with with_disk(engine, tmp_path):
        ask(engine, whole)
    monkeypatch.setattr(disk, "PATIENCE_S", 0.2)
    with with_disk(engine, tmp_path):
        go = threading.Event()
        read = engine.disk._read
        monkeypatch.setattr(engine.disk, "_read", lambda r: (go.wait(30), read(r))[1])
        tokens, cached = ask(engine, whole)
        go.set()
        assert (tokens, cached) == (cold[700], 0)


def test_a_request_that_is_cancelled_while_it_waits_leaves_nothing(engine, tmp_path, monkeypatch):
    whole = make_prompt(0, 700)
    with with_disk(engine, tmp_path):
        ask(engine, whole)
    with with_disk(engine, tmp_path):
        go = threading.Event()
        read = engine.disk._read
        monkeypatch.setattr(engine.disk, "_read", lambda r: (go.wait(30), read(r))[1])
        stream = engine.stream(whole, SamplingParams(6), frozenset())
        stream.close()
        assert list(stream) == [] and stream.request.status is Status.FINISHED
        go.set()
        assert ask(engine, make_prompt(9, 300))[1] == 0
        assert engine.host.staged == 0


def test_several_requests_for_the_same_prefix(engine, cold, tmp_path):
    whole = make_prompt(0, 700)
    with with_disk(engine, tmp_path):
        for length in LENGTHS:
            ask(engine, whole[:length])
    with with_disk(engine, tmp_path), ThreadPoolExecutor(5) as pool:
        jobs = [whole[:n] for n in (700, 640, 513, 385, 700)]
        found = list(pool.map(lambda prompt: ask(engine, prompt), jobs))
        for prompt, (tokens, cached) in zip(jobs, found, strict=True):
            assert tokens == cold[len(prompt)] and cached == (len(prompt) - 1) // 128 * 128


def test_an_emptied_cache_is_empty_on_disk_too(engine, cold, tmp_path):
    whole = make_prompt(0, LENGTHS[-1])
    with with_disk(engine, tmp_path):
        ask(engine, whole)
        assert engine.flush_cache() > 0
        assert not engine.disk.store.names()
        assert ask(engine, whole) == (cold[LENGTHS[-1]], 0)
