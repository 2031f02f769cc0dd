"""When the client leaves, the model stops; when the server stops, clients are told."""

import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.worker import Job
from tests.serving.fakes import PATIENCE_S, FakeModel, answer, ids, make_service
from tests.serving.killed import kill_client
from tests.serving.live import serving

ASK = {"messages": [{"role": "user", "content": "q"}]}


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits until `condition()`; the limit is only there so that failures end."""
    pause = threading.Event()
    for _ in range(PATIENCE_S * 1000):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it did not happen")


def also(function: Callable[..., None], then: Callable[[], None]) -> Callable[..., None]:
    def both(*args: object) -> None:
        function(*args)
        then()

    return both


@contextmanager
def sent(address: str, body: dict) -> Iterator[socket.socket]:
    """Sends a request and hands over its socket."""
    request = httpx.Request("POST", f"{address}/v1/chat/completions", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port or 80)) as client:
        client.settimeout(PATIENCE_S)
        client.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        yield client


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_the_model_works(stream, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    noticed = threading.Event()
    monkeypatch.setattr(Job, "cancel", also(Job.cancel, noticed.set))
    gate = threading.Semaphore(0)
    model = FakeModel(answer("never the end", reasoning="r"), gate=gate)
    service = make_service(model)
    with serving(service) as address:
        with sent(address, ASK | {"stream": stream}) as client:
            assert model.started.wait(PATIENCE_S)
            gate.release()
            if stream:
                assert client.recv(10)
        assert noticed.wait(PATIENCE_S)
        gate.release()
        assert model.closed.wait(PATIENCE_S)
        assert model.streamed <= 2
        wait_for(lambda: service.thread.admitted == 0)
        wait_for(lambda: "aborted_by=client" in caplog.text)
        model.gate = None
        reply = httpx.post(f"{address}/v1/chat/completions", json=ASK)
        assert reply.status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_the_queue(stream):
    gate = threading.Semaphore(0)
    model = FakeModel(answer("x"), gate=gate)
    service = make_service(model, max_waiting=1)
    with serving(service) as address:
        with sent(address, ASK):
            assert model.started.wait(PATIENCE_S)
            with sent(address, ASK | {"stream": stream}):
                wait_for(lambda: service.thread.admitted == 2)
                full = httpx.post(f"{address}/v1/chat/completions", json=ASK)
                assert full.status_code == 429
                assert int(full.headers["retry-after"]) > 0
                assert full.json()["error"]["type"] == "rate_limit_error"
                counted = httpx.get(f"{address}/metrics").text
                assert re.search(r'admission_rejections_total\{.*"queue_full"\} 1', counted)
            wait_for(lambda: service.thread.admitted == 1)
            assert httpx.get(f"{address}/health").status_code == 200
        while not model.closed.is_set():
            gate.release()
        wait_for(lambda: service.thread.admitted == 0)
        assert len(model.prompts) == 1


def test_stopping_the_server_ends_running_streams():
    gate = threading.Semaphore(0)
    model = FakeModel(answer("x" * 100), gate=gate)
    service = make_service(model)
    with serving(service) as address:
        with sent(address, ASK | {"stream": True}) as client:
            assert model.started.wait(PATIENCE_S)
            gate.release()
            assert client.recv(10)
            service.thread.stop()
            gate.release()
            text = b""
            while data := client.recv(4096):
                text += data
                if b"[DONE]" in text:
                    break
        assert b'"code":"draining"' in text
        refused = httpx.post(f"{address}/v1/chat/completions", json=ASK)
        assert refused.status_code == 503


def test_a_client_that_is_killed_in_the_middle_of_a_call(caplog):
    caplog.set_level(logging.INFO)
    call = f'\n\n<{C.DSML}tool_calls>\n<{C.DSML}invoke name="f">\n'
    call += f'<{C.DSML}parameter name="a" string="true">' + "x" * 500
    gate = threading.Semaphore(0)
    model = FakeModel(call, gate=gate)
    service = make_service(model)
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = ASK | {"stream": True, "tools": tools, "thinking": {"type": "disabled"}}
    begun = len(ids(call)) - 400
    gate.release(begun)
    with serving(service) as address:
        kill_client(address, body, until="xxx")
        assert model.closed.wait(PATIENCE_S)
        wait_for(lambda: service.thread.admitted == 0)
        wait_for(lambda: "aborted_by=client" in caplog.text)
        assert model.streamed <= begun
        model.gate = None
        model.says = [answer("fine")]
        assert httpx.post(f"{address}/v1/chat/completions", json=ASK).status_code == 200
