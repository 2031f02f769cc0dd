"""What only whoever runs the server may do."""

import threading

import httpx
import pytest
from starlette.testclient import TestClient

from dsv4_jax.serving.api import create_app
from dsv4_jax.serving.engine.stream import EngineError
from tests.serving.fakes import PATIENCE_S, FakeModel, answer, make_service
from tests.serving.live import serving

ASK = {"messages": [{"role": "user", "content": "q"}]}
PATHS = ("/admin/drain", "/admin/flush_cache")
HERE = ("127.0.0.1", 5000)


def post(path: str, settings: dict, client=HERE, **headers: str):
    service = make_service(FakeModel(answer("hi")), **settings)
    with TestClient(create_app(service), client=client) as server:
        return server.post(path, headers=headers)


USERS, BOTH = {"api_keys": ("user",)}, {"api_keys": ("user",), "admin_keys": ("boss",)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("settings", "client", "headers", "status", "code"),
    [
        ({}, HERE, {}, 200, None),
        ({}, ("::1", 5000), {}, 200, None),
        ({}, ("192.0.2.7", 5000), {}, 403, "admin_only"),
        ({}, ("a socket", 0), {}, 403, "admin_only"),
        ({}, HERE, {"origin": "http://evil.example"}, 403, "admin_only"),
        (USERS, HERE, {"authorization": "Bearer user"}, 403, "admin_only"),
        (BOTH, HERE, {}, 401, "invalid_api_key"),
        (BOTH, HERE, {"authorization": "Bearer other"}, 401, "invalid_api_key"),
        (BOTH, HERE, {"authorization": "Bearer user"}, 403, "admin_only"),
        (BOTH, ("192.0.2.7", 5000), {"authorization": "Bearer boss"}, 200, None),
        ({"admin_keys": ("boss",)}, HERE, {"x-api-key": "boss"}, 200, None),
    ],
)
def test_who_may(path, settings, client, headers, status, code):
    reply = post(path, settings, client, **headers)
    assert reply.status_code == status, reply.text
    if code:
        error = reply.json()["error"]
        kind = "permission_error" if status == 403 else "authentication_error"
        assert (error["code"], error["type"]) == (code, kind)


def test_an_admin_key_is_not_a_user_s():
    service = make_service(FakeModel(answer("hi")), **BOTH)
    with TestClient(create_app(service)) as client:
        headers = {"authorization": "Bearer boss"}
        assert client.post("/v1/chat/completions", json=ASK, headers=headers).status_code == 401


def test_draining_finishes_what_was_taken_and_refuses_the_rest():
    gate = threading.Semaphore(0)
    model = FakeModel(answer("done"), gate=gate)
    service = make_service(model)
    replies: list[httpx.Response] = []
    with serving(service) as address:

        def ask() -> httpx.Response:
            return httpx.post(f"{address}/v1/chat/completions", json=ASK, timeout=PATIENCE_S)

        running = threading.Thread(target=lambda: replies.append(ask()))
        running.start()
        assert model.started.wait(PATIENCE_S)
        for _ in range(2):
            drained = httpx.post(f"{address}/admin/drain").json()
            assert drained == {"phase": "draining", "unfinished": 1}
        assert httpx.get(f"{address}/ready").status_code == 503
        assert httpx.get(f"{address}/health").status_code == 200
        refused = ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        gate.release(100)
        running.join(PATIENCE_S)
    assert replies[0].status_code == 200


def test_emptying_the_cache():
    service = make_service(model := FakeModel(answer("hi")))
    with TestClient(create_app(service), client=HERE) as client:
        assert client.post("/admin/flush_cache").json() == {"forgotten_tokens": 128}
        assert model.flushed == 1

        def broken() -> int:
            raise EngineError("the engine has stopped")

        model.flush_cache = broken
        reply = client.post("/admin/flush_cache")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unhealthy")
