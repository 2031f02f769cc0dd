"""Several processes of one job: the line between them.

All run the same command. The first owns HTTP and scheduling and tells the others what to compute
(`engine.mirror`).
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv4_jax.serving.engine.mirror import ProcessLost
from sharding.processes import AUTO

CONNECT_TIMEOUT_S = 300.0
TOKEN_BYTES, ADDRESS_BYTES, LENGTH_BYTES = 16, 256, 8
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def connect(coordinator: str | None) -> Leader | Follower | None:
    """The line to the other processes; None if there are none. Every process must call this."""
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return None
    host = (coordinator or AUTO).rpartition(":")[0]
    host = host or socket.gethostbyname(socket.gethostname())
    listener = socket.create_server(("127.0.0.1" if host in LOOPBACK else "", 0))
    told = f"{host} {listener.getsockname()[1]}".encode().ljust(ADDRESS_BYTES)
    told += secrets.token_bytes(TOKEN_BYTES)
    told = np.frombuffer(told, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(told)).astype(np.uint8).tobytes()
    token = told[ADDRESS_BYTES:]
    with listener:
        if index == 0:
            return Leader(_accepted(listener, token, count - 1))
    host, port = told[:ADDRESS_BYTES].decode().split()
    line = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
    line.sendall(token + index.to_bytes(LENGTH_BYTES, "little"))
    return Follower(line)


def _accepted(listener: socket.socket, token: bytes, count: int) -> dict[int, socket.socket]:
    """Lines to all other processes by their index; whoever lacks the token is turned away."""
    listener.settimeout(CONNECT_TIMEOUT_S)
    found: dict[int, socket.socket] = {}
    while len(found) < count:
        try:
            line, _ = listener.accept()
        except TimeoutError:
            raise ProcessLost(f"{count - len(found)} processes did not connect") from None
        line.settimeout(CONNECT_TIMEOUT_S)
        try:
            greeting = _read(line, len(token) + LENGTH_BYTES)
        except (ProcessLost, OSError):
            greeting = b""
        if not secrets.compare_digest(greeting[: len(token)], token):
            line.close()
            continue
        found[int.from_bytes(greeting[len(token) :], "little")] = line
    return found


def _ready(line: socket.socket) -> None:
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _read(line: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        try:
            part = line.recv(min(count, 1 << 20))
        except ConnectionError:
            part = b""
        if not part:
            raise ProcessLost("the other process is gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class Leader:
    """Lines from the first process to all others: a `mirror.Sender`."""

    def __init__(self, lines: dict[int, socket.socket]) -> None:
        self._lines = lines
        self._is_closed = False
        for line in lines.values():
            _ready(line)

    def watch(self, on_lost: Callable[[ProcessLost], object]) -> None:
        """Calls `on_lost` from a thread of its own when a process goes away."""

        def wait(index: int, line: socket.socket) -> None:
            try:
                line.recv(1)  # nobody sends: this returns when the line ends
            except OSError:
                pass  # so does a broken one
            if not self._is_closed:
                on_lost(ProcessLost(f"process {index} of {len(self._lines) + 1} is gone"))

        for index, line in self._lines.items():
            threading.Thread(target=wait, args=(index, line), daemon=True).start()

    def send(self, message: bytes) -> None:
        framed = len(message).to_bytes(LENGTH_BYTES, "little") + message
        for index, line in self._lines.items():
            try:
                line.sendall(framed)
            except OSError as error:
                raise ProcessLost(f"process {index} is gone") from error

    def close(self) -> None:
        self._is_closed = True
        for line in self._lines.values():
            line.close()


class Follower:
    """The line to the first process: a `mirror.Receiver`."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        _ready(line)

    def receive(self) -> bytes:
        try:
            return _read(self._line, int.from_bytes(_read(self._line, LENGTH_BYTES), "little"))
        except ProcessLost:
            raise ProcessLost("the first process is gone") from None

    def close(self) -> None:
        self._line.close()
