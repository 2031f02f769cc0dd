"""Ports, and loading behind a server that already answers."""

import os
import signal
import socket
import threading

import httpx
import pytest

from dsv4_jax.serving.errors import ServerFailed
from dsv4_jax.serving.launch import fingerprint, how_to_use, listen, serve, url_of
from dsv4_jax.serving.service import Service, Settings
from tests.serving.fakes import MODEL, PATIENCE_S, FakeModel, answer, chat_answer, make_service


def test_a_free_port():
    with listen("127.0.0.1", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listen("0.0.0.0", 0) as listener:
        assert url_of(listener).startswith("http://127.0.0.1:")


def test_a_port_in_use_suggests_another():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127\.0\.0\.1 is in use"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "problem"),
    [
        ("127.0.0.1", 70_000, "between 0 and 65535"),
        ("192.0.2.1", 0, "cannot listen on 192.0.2.1"),
        ("not a host", 0, "not an address"),
    ],
)
def test_impossible_addresses(host, port, problem):
    with pytest.raises(ValueError, match=problem):
        listen(host, port)


def test_fingerprints_tell_parts_apart():
    assert fingerprint(b"ab", b"c") != fingerprint(b"a", b"bc")
    assert fingerprint(b"ab") == fingerprint(b"ab")


def test_the_printed_command_can_be_pasted():
    text = how_to_use("http://127.0.0.1:1", True, "mine")
    assert "curl http://127.0.0.1:1/v1/chat/completions -H 'authorization: Bearer KEY'" in text
    assert "authorization" not in how_to_use("http://127.0.0.1:1", False, "mine")
    program = [line[11:] for line in text.partition("Python ")[2].splitlines()]
    compile("\n".join(["from openai import OpenAI", *program[1:]]), "shown", "exec")
    assert 'model="mine"' in text


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_failed_engine_ends_the_server(is_streamed):
    service = Service(Settings((MODEL,)))
    gate = threading.Semaphore(0)
    model = FakeModel(answer("hi"), gate=gate)
    loaded = make_service(model).loaded()
    listener = listen("127.0.0.1", 0)
    path, seen = f"{url_of(listener)}/v1/chat/completions", []

    def ask() -> None:
        seen.append(httpx.post(path, json=ASK | {"stream": is_streamed}, timeout=PATIENCE_S).text)

    client = threading.Thread(target=ask)

    def load() -> None:
        service.ready(loaded.planner, loaded.model, loaded.fingerprint)
        client.start()
        assert model.started.wait(PATIENCE_S)
        model.fails_after = 0
        model.failure = RuntimeError("out of memory")
        gate.release(100)

    with pytest.raises(ServerFailed, match="the engine stopped: out of memory"):
        serve(service, listener, load)
    client.join(PATIENCE_S)
    assert "engine_unhealthy" in seen[0]


def test_a_failing_load_stops_the_server():
    def load() -> None:
        raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"):
        serve(Service(Settings((MODEL,))), listen("127.0.0.1", 0), load)


def test_it_answers_while_it_loads():
    service = Service(Settings((MODEL,)))
    loaded = make_service(FakeModel(answer("hi"))).loaded()
    listener = listen("127.0.0.1", 0)
    address = url_of(listener)
    seen: list[httpx.Response] = []

    def load() -> None:
        seen.append(httpx.get(f"{address}/ready", timeout=PATIENCE_S))
        service.ready(loaded.planner, loaded.model, loaded.fingerprint)
        seen.append(httpx.get(f"{address}/ready", timeout=PATIENCE_S))
        raise InterruptedError  # the only way a test can end the server

    with pytest.raises(InterruptedError):
        serve(service, listener, load)
    assert [reply.status_code for reply in seen] == [503, 200]


@pytest.fixture
def sigterm_interrupts():
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, previous)


ASK = {"messages": [{"role": "user", "content": "Hi"}], "thinking": {"type": "disabled"}}


@pytest.mark.parametrize("ends", ["finished", "timeout", "second signal"])
def test_sigterm_drains(ends, sigterm_interrupts):
    gate = threading.Semaphore(0)
    model = FakeModel(chat_answer("hello"), gate=gate)
    loaded = make_service(model).loaded()
    service = Service(Settings((MODEL,)))
    listener = listen("127.0.0.1", 0)
    address = url_of(listener)
    seen: dict[str, int] = {}

    def running() -> None:
        try:
            reply = httpx.post(f"{address}/v1/chat/completions", json=ASK, timeout=PATIENCE_S)
            seen["running"] = reply.status_code
        except httpx.TransportError:
            seen["running"] = 0

    client = threading.Thread(target=running)

    def load() -> None:
        service.ready(loaded.planner, loaded.model, loaded.fingerprint)
        client.start()
        assert model.started.wait(PATIENCE_S)
        os.kill(os.getpid(), signal.SIGTERM)
        while service.phase != "draining":
            threading.Event().wait(0.01)
        if ends == "finished":
            seen["new"] = httpx.post(f"{address}/v1/chat/completions", json=ASK).status_code
            seen["ready"] = httpx.get(f"{address}/ready").status_code
        if ends == "second signal":
            os.kill(os.getpid(), signal.SIGTERM)
        gate.release(100)

    with pytest.raises(KeyboardInterrupt):
        serve(service, listener, load, drain_timeout_s=0 if ends == "timeout" else PATIENCE_S)
    client.join(PATIENCE_S)
    assert not client.is_alive()
    if ends == "finished":
        assert seen == {"running": 200, "new": 503, "ready": 503}
        assert model.streamed == len("hello") + 1
