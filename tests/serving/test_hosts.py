"""The line between processes, without a job around it."""

import socket
import threading

import pytest

from dsv4_jax.serving import hosts
from dsv4_jax.serving.engine.mirror import ProcessLost
from dsv4_jax.serving.hosts import Follower, Leader
from tests.serving.fakes import PATIENCE_S


@pytest.fixture
def line():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        one, _ = listener.accept()
    leader, follower = Leader({1: one}), Follower(other)
    yield leader, follower
    leader.close()
    follower.close()


def test_messages_arrive_whole_and_in_order(line):
    leader, follower = line
    messages = [b"", b"x", bytes(3_000_000), b"last"]
    sending = threading.Thread(target=lambda: [leader.send(message) for message in messages])
    sending.start()
    assert [follower.receive() for _ in messages] == messages
    sending.join(PATIENCE_S)


def test_a_follower_notices_that_the_first_process_is_gone(line):
    leader, follower = line
    leader._lines[1].sendall((8).to_bytes(8, "little") + b"half")
    leader.close()
    with pytest.raises(ProcessLost, match="the first process is gone"):
        follower.receive()


def test_the_first_process_notices_that_another_is_gone(line):
    leader, follower = line
    noticed = threading.Event()
    found = []
    leader.watch(lambda reason: (found.append(str(reason)), noticed.set()))
    follower.close()
    assert noticed.wait(PATIENCE_S)
    assert found == ["process 1 of 2 is gone"]
    with pytest.raises(ProcessLost, match="process 1 is gone"):
        for _ in range(100):
            leader.send(bytes(1 << 16))


def test_strangers_are_turned_away():
    token = b"t" * hosts.TOKEN_BYTES
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        found = {}

        def accept() -> None:
            found.update(hosts._accepted(listener, token, 1))

        accepting = threading.Thread(target=accept)
        accepting.start()
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            stranger.settimeout(PATIENCE_S)
            try:
                assert stranger.recv(1) == b""
            except ConnectionResetError:
                pass  # closed with bytes unread
        with socket.create_connection(address) as friend:
            friend.sendall(token + (1).to_bytes(hosts.LENGTH_BYTES, "little"))
            accepting.join(PATIENCE_S)
            assert list(found) == [1]
        found[1].close()
