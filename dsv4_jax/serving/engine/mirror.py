"""Several processes that run one engine: the first plans, and all call the same programs.

Every process holds its devices' part of the weights and a whole state. A call of a program is sent
as a message with its host arrays; what the receiver has is not sent again. Messages are numbered
and checked, so that processes that drift apart stop instead of computing nonsense.
"""

from __future__ import annotations

import json
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import struct

from dsv4_jax.sampling import Knobs
from dsv4_jax.serving.engine.device import Batch, Prompt
from dsv4_jax.serving.engine.programs import Programs

BATCH = Batch(0, 0, 0, Knobs(*[0] * len(Knobs._fields)), 0)
# Programs with what they take behind weights and state, as trees of one leaf per host array.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "init": (),
    "decode": (BATCH,),
    "verify": (BATCH,),
    "burst": (BATCH,),
    "prefill": (BATCH, Prompt(0, 0, 0, 0)),
    "start_slot": (0, 0, 0),
    "set_uses": (0, 0),
    "copy_pages": (0, 0),
    "read_pages": (0,),
    "write_pages": (0, 0),
    "read_slot": (0,),
    "write_slot": (0, 0),
    "read_checkpoint": (0,),
    "write_checkpoint": (0, 0),
    "save_rings": (0, 0),
    "load_rings": (0, 0),
}
STEPS = ("decode", "verify", "burst", "prefill")
READS = ("read_pages", "read_slot", "read_checkpoint")
END = "end"


class ProcessLost(ConnectionError):
    """Another process of the job is gone, or does not do what this one does."""


class Sender(Protocol):
    """To all other processes; whole messages, in order."""

    def send(self, message: bytes) -> None:
        """Raises ProcessLost: one of them is gone."""
        ...


class Receiver(Protocol):
    """From the first process."""

    def receive(self) -> bytes:
        """Raises ProcessLost: it is gone."""
        ...


@struct.dataclass
class Kept:
    """What a read returned, here and under the same number in every other process."""

    tree: Any
    number: int = struct.field(pytree_node=False)


class _Message(NamedTuple):
    """A call: which program, and its leaves: arrays, `SAME` as last time, or a kept tree's number.

    drop: numbers that nobody asks for any more.
    """

    number: int
    program: str
    leaves: list[Any]
    drop: list[int]


class _Same:
    pass


SAME = _Same()


def encode(message: _Message) -> bytes:
    """A line of JSON with sizes and types, then the arrays' bytes, then a check sum."""
    kinds: list[Any] = []
    arrays: list[bytes] = []
    for leaf in message.leaves:
        if leaf is SAME:
            kinds.append("same")
        elif isinstance(leaf, Kept):
            kinds.append(leaf.number)
        else:
            array = np.asarray(leaf)
            kinds.append([array.dtype.str, list(array.shape)])
            arrays.append(array.tobytes())
    head = json.dumps([message.number, message.program, kinds, message.drop]).encode()
    body = b"".join([len(head).to_bytes(4, "little"), head, *arrays])
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode(data: bytes) -> _Message:
    """What `encode` wrote; kept trees as their numbers.

    Raises:
        ProcessLost: it is damaged.
    """
    body, check = data[:-4], data[-4:]
    if len(data) < 8 or zlib.crc32(body) != int.from_bytes(check, "little"):
        raise ProcessLost("a message was damaged on its way")
    start = 4 + int.from_bytes(body[:4], "little")
    number, program, kinds, drop = json.loads(body[4:start])
    leaves: list[Any] = []
    for kind in kinds:
        if isinstance(kind, list):
            dtype, shape = np.dtype(kind[0]), tuple(kind[1])
            size = int(np.prod(shape, dtype=np.int64))
            leaves.append(np.frombuffer(body, dtype, size, start).reshape(shape))
            start += size * dtype.itemsize
        else:
            leaves.append(SAME if kind == "same" else kind)
    return _Message(number, program, leaves, drop)


class Mirror:
    """`Programs` that all processes run: tells the others about each call, then makes it here."""

    def __init__(self, programs: Programs, channel: Sender) -> None:
        self.sizes, self.vocab_size = programs.sizes, programs.vocab_size
        self.params = programs.params
        self._programs, self._channel = programs, channel
        self._calls, self._reads = 0, 0
        self._last: dict[tuple[str, int], tuple[Any, Any]] = {}  # host array, the same placed
        self._dropped: list[int] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ARGUMENTS:
            raise AttributeError(name)
        return lambda *args: self._call(name, args)

    def put(self, tree: Any) -> Any:
        """Host arrays stay where they are until they are sent."""
        return tree

    def tie(self, owner: Any, tree: Any) -> None:
        """What was read is kept everywhere until `owner` goes."""
        assert isinstance(tree, Kept)
        weakref.finalize(owner, self._dropped.append, tree.number)

    def end(self) -> None:
        """Lets the other processes go."""
        self._send(END, [])

    def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        own = len(args) - len(ARGUMENTS[name])  # weights and state
        host = args[own:]
        leaves, treedef = jax.tree.flatten(host, is_leaf=lambda a: isinstance(a, Kept))
        told, placed = [], []
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, Kept):
                told.append(leaf)
                placed.append(leaf.tree)
                continue
            last, there = self._last.get((name, at), (None, None))
            if last is not leaf:
                there = self._programs.put(np.asarray(leaf))
                self._last[name, at] = leaf, there
            told.append(SAME if last is leaf else leaf)
            placed.append(there)
        self._send(name, told)
        result = getattr(self._programs, name)(*args[:own], *jax.tree.unflatten(treedef, placed))
        if name not in READS:
            return result
        self._reads += 1
        return Kept(result, self._reads)

    def _send(self, name: str, leaves: list[Any]) -> None:
        drop, self._dropped[:] = list(self._dropped), []
        self._channel.send(encode(_Message(self._calls, name, leaves, drop)))
        self._calls += 1


def follow(programs: Programs, channel: Receiver) -> None:
    """Does what the first process does until it ends.

    Raises:
        ProcessLost: it is gone, or the two do not fit together.
    """
    state: Any = None
    kept: dict[int, Any] = {}
    reads = 0
    for name, args, drop in _calls(programs, channel, kept):
        if name == "init":
            state = programs.init()
        elif name in READS:
            reads += 1
            kept[reads] = jax.device_get(getattr(programs, name)(state, *args))
        elif name in STEPS:
            state = getattr(programs, name)(programs.params, state, *args)[0]
        else:
            state = getattr(programs, name)(state, *args)
        for number in drop:
            kept.pop(number, None)


def _calls(
    programs: Programs, channel: Receiver, kept: dict[int, Any]
) -> Iterator[tuple[str, list[Any], list[int]]]:
    """Calls as they come in, with their arrays placed."""
    last: dict[tuple[str, int], Any] = {}
    expected = 0
    while True:
        message = decode(channel.receive())
        if message.number != expected:
            raise ProcessLost(f"call {expected} was expected, call {message.number} came")
        expected += 1
        name = message.program
        if name == END:
            return
        leaves = []
        for at, leaf in enumerate(message.leaves):
            if isinstance(leaf, int):
                leaves.append(kept[leaf])
                continue
            if leaf is not SAME:
                last[name, at] = programs.put(leaf)
            leaves.append(last[name, at])
        treedef = jax.tree.structure(ARGUMENTS[name])
        yield name, list(jax.tree.unflatten(treedef, leaves)), message.drop
