"""What one process tells the others: whole, in order, and only what is new."""

import queue

import numpy as np
import pytest

from dsv4_jax.sampling import knobs_of
from dsv4_jax.serving.engine import mirror
from dsv4_jax.serving.engine.device import Batch, Prompt, Sizes
from dsv4_jax.serving.engine.mirror import Kept, Mirror, ProcessLost, encode, follow
from dsv4_jax.serving.engine.mirror import _Message as Message

STATE = np.zeros(3)


class Line:
    """Both ends of a channel."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.sizes: list[int] = []

    def send(self, message: bytes) -> None:
        self.messages.put(message)
        self.sizes.append(len(message))

    def receive(self) -> bytes:
        return self.messages.get()


class Recorder:
    """Stands for `Programs`: notes each call and what it was given."""

    params, vocab_size, sizes = "weights", 7, Sizes(1, 2, 128, 128, 1)

    def __init__(self) -> None:
        self.calls: list = []

    def __getattr__(self, name):
        def run(*args):
            self.calls.append((name, args))
            if name in mirror.READS:
                return {"rows": np.full(2, len(self.calls))}
            return (STATE, "sampled", "scores") if name in mirror.STEPS else STATE

        return run

    def put(self, tree):
        return tree


def batch(step: int, table: np.ndarray) -> Batch:
    rows = np.array([[step, 1, 1]], np.int32)
    words = np.array([[step]], np.uint32)
    return Batch(rows, np.zeros(1, np.int32), table, knobs_of([], 1), words)


def leaves(args) -> list:
    found = []
    for arg in args:
        parts = arg if isinstance(arg, tuple) else [arg]
        found += leaves(parts) if isinstance(arg, tuple) else [arg]
    return found


def test_a_follower_makes_the_same_calls_with_the_same_arrays():
    line, here, there = Line(), Recorder(), Recorder()
    leader = Mirror(here, line)  # pyright: ignore[reportArgumentType]
    table = np.arange(1000, dtype=np.int32)[None]
    state = leader.init()
    for step in range(3):
        leader.decode(leader.params, state, batch(step, table))
    prompt = Prompt(
        np.ones((1, 4), np.int32),
        np.zeros((1, 4), np.int32),
        np.zeros(1, bool),
        np.zeros(1, np.int32),
    )
    leader.prefill(leader.params, state, batch(9, table), prompt)
    leader.start_slot(state, np.int32(1), np.int32(5), np.int32(9))
    owner = Line()
    pages = leader.read_pages(state, np.array([1], np.int32))
    assert isinstance(pages, Kept)
    leader.tie(owner, pages)
    leader.write_pages(state, np.array([2], np.int32), pages)
    del owner
    leader.save_rings(state, np.int32(0), np.int32(1))
    leader.end()
    follow(there, line)  # pyright: ignore[reportArgumentType]
    assert [name for name, _ in there.calls] == [name for name, _ in here.calls]
    for (name, mine), (_, theirs) in zip(there.calls, here.calls, strict=True):
        for a, b in zip(leaves(mine), leaves(theirs), strict=True):
            if isinstance(a, dict):
                a, b = a["rows"], b["rows"]
            np.testing.assert_array_equal(a, b, name)
    assert line.sizes[2] < line.sizes[1] - table.nbytes  # the table did not change
    drops = [mirror.decode(message).drop for message in replayed(line)]
    assert drops == []


def replayed(line: Line) -> list[bytes]:
    found = []
    while not line.messages.empty():
        found.append(line.messages.get())
    return found


def test_what_nobody_needs_is_dropped_by_the_next_message():
    line = Line()
    leader = Mirror(Recorder(), line)  # pyright: ignore[reportArgumentType]
    owner = Line()
    leader.tie(owner, leader.read_slot(STATE, np.int32(0)))
    leader.start_slot(STATE, np.int32(1), np.int32(5), np.int32(9))
    del owner
    leader.start_slot(STATE, np.int32(1), np.int32(6), np.int32(9))
    leader.start_slot(STATE, np.int32(1), np.int32(7), np.int32(9))
    assert [mirror.decode(message).drop for message in replayed(line)] == [[], [], [1], []]


def test_a_missing_or_damaged_message_is_noticed():
    line = Line()
    line.send(encode(Message(1, "init", [], [])))
    with pytest.raises(ProcessLost, match="call 0 was expected, call 1 came"):
        follow(Recorder(), line)  # pyright: ignore[reportArgumentType]
    good = encode(Message(0, "start_slot", [np.int32(1), np.int32(2), np.int32(9)], []))
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 4
        with pytest.raises(ProcessLost, match="damaged"):
            mirror.decode(bytes(bad))
    for size in range(len(good)):
        with pytest.raises(ProcessLost, match="damaged"):
            mirror.decode(good[:size])
