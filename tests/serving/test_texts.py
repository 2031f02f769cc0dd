"""Looking at prompts, cancelling requests, and what the server counts."""

import json
import logging
import threading

import httpx
import pytest
from starlette.testclient import TestClient

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.api import create_app
from tests.serving.fakes import (
    MAX_LEN,
    MODEL,
    PATIENCE_S,
    FakeModel,
    answer,
    counted,
    ids,
    make_service,
)
from tests.serving.live import serving
from tests.serving.test_disconnect import wait_for

USER = {"role": "user", "content": "q"}
ASK = {"messages": [USER]}


@pytest.fixture
def client():
    service = make_service(FakeModel(answer("hi")))
    with TestClient(create_app(service)) as client:
        yield client


def test_tokenizing_a_text(client):
    reply = client.post("/tokenize", json={"prompt": f"é{C.EOS}"}).json()
    assert reply == {
        "count": len(reply["tokens"]),
        "max_model_len": MAX_LEN,
        "tokens": ids("é") + [i for part in C.EOS for i in ids(part)],
    }
    asked = {"prompt": "ab", "add_bos": True, "return_token_strs": True}
    reply = client.post("/tokenize", json=asked).json()
    assert reply["tokens"] == ids(f"{C.BOS}ab")
    assert reply["token_strs"] == [C.BOS, "a", "b"]


def test_tokenizing_a_chat_is_rendering_it(client):
    tokens = client.post("/tokenize", json=ASK).json()["tokens"]
    rendered = client.post("/v1/chat/render", json=ASK).json()
    assert tokens == rendered["tokens"] == ids(rendered["prompt"])
    assert rendered["prompt"].endswith(f"{C.USER}q{C.ASSISTANT}{C.THINK_START}")


def test_the_plan_is_shown(client):
    tool = {"type": "function", "function": {"name": "f"}}
    asked = ASK | {"tools": [tool], "reasoning_effort": "low", "max_tokens": 5, "n": 2}
    plan = client.post("/v1/chat/render", json=asked).json()["plan"]
    assert plan == {
        "thinking": True,
        "effort": plan["effort"],
        "profile": "official",
        "starts_in_reasoning": True,
        "tools": ["f"],
        "max_tokens": 5,
        "n": 2,
        "stop": [],
        "thinking_budget": None,
        "content_grammar": False,
        "tool_grammar": True,
        "warning": None,
    }


def test_detokenizing(client):
    tokens = ids(f"é{C.USER}")
    reply = client.post("/detokenize", json={"tokens": tokens})
    assert reply.json() == {"prompt": f"é{C.USER}"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "gpt"}, "model"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", [], None),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/v1/chat/render", {"messages": [USER], "n": 0}, "n"),
    ],
)
def test_wrong_bodies(client, path, body, param):
    reply = client.post(path, json=body)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["param"] == param


# Cancelling


@pytest.mark.parametrize(("by", "stream"), [("request", True), ("request", False), ("reply", True)])
def test_cancelling(by, stream):
    model = FakeModel(answer("never the end"), gate=threading.Semaphore(0))
    service = make_service(model)
    with serving(service) as address:
        with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
            found: list[httpx.Response] = []

            def ask() -> None:
                headers = {"x-request-id": "mine"}
                asked = ASK | {"stream": stream}
                found.append(client.post("/v1/chat/completions", json=asked, headers=headers))

            asking = threading.Thread(target=ask)
            asking.start()
            assert model.started.wait(PATIENCE_S)
            wait_for(lambda: len(service._running) == 2)
            names = {name for _, name in service._running}
            name = "mine" if by == "request" else next(iter(names - {"mine"}))
            reply = client.post(f"/v1/requests/{name}/cancel")
            assert reply.json() == {"id": name, "cancelled": True}
            asking.join(PATIENCE_S)
            assert model.closed.wait(PATIENCE_S)
            assert (found[0].status_code, '"request_cancelled"' in found[0].text) == (499, True)
            again = client.post(f"/v1/requests/{name}/cancel")
            assert again.json() == {"id": name, "cancelled": False}
            model.gate = None
            assert client.post("/v1/chat/completions", json=ASK).status_code == 200


def test_only_the_tenant_can_cancel():
    model = FakeModel(answer("x"), gate=threading.Semaphore(0))
    service = make_service(model, api_keys=("one", "two"))
    with serving(service) as address:
        one, two = ({"x-api-key": key, "x-request-id": "mine"} for key in ("one", "two"))
        with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
            asking = threading.Thread(
                target=client.post,
                args=("/v1/chat/completions",),
                kwargs={"json": ASK, "headers": one},
            )
            asking.start()
            assert model.started.wait(PATIENCE_S)
            wait_for(lambda: bool(service._running))
            path = "/v1/requests/mine/cancel"
            assert not client.post(path, headers=two).json()["cancelled"]
            assert client.post(path).status_code == 401
            assert client.post(path, headers=one).json()["cancelled"]
            asking.join(PATIENCE_S)


# The log, and numbers


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    records = [record for record in caplog.records if record.name.endswith("answers")]
    return [dict(p.split("=", 1) for p in record.getMessage().split()) for record in records]


def test_one_line_per_request(caplog):
    caplog.set_level(logging.INFO)
    model = FakeModel(answer("secret", reasoning="private"))
    model.cached_tokens = 2
    with TestClient(create_app(make_service(model))) as client:
        client.post("/v1/chat/completions", json=ASK | {"n": 2, "user": "someone"})
        client.post("/v1/completions", json={"prompt": "secret", "max_tokens": 3})
        client.post("/v1/chat/completions", json=ASK | {"stream": True, "max_tokens": 2})
        model.fails_after = 0
        assert client.post("/v1/chat/completions", json=ASK).status_code == 500
    first, second, third, fourth = lines(caplog)
    assert (first["n"], first["finish"], first["cached"]) == ("2", "stop,stop", "2")
    assert int(first["completion"]) == 2 * len(ids(model.says[0]))
    assert int(first["reasoning"]) == 2 * len("private") + 2
    assert (first["mode"], second["mode"]) == ("thinking:high", "raw")
    assert first["tenant"] != second["tenant"]
    assert (second["finish"], third["finish"]) == ("length", "length")
    assert (fourth["finish"], fourth["aborted_by"]) == ("error", "-")
    assert "secret" not in caplog.text and "someone" not in caplog.text


def test_what_is_counted(client):
    client.post("/v1/chat/completions", json=ASK)
    client.post("/v1/chat/completions", json={})
    text = client.get("/metrics").text
    whose = {"model_name": MODEL, "engine": "0"}
    assert counted(text, "dsv4:answers_total", reason="stop", **whose) == 1
    assert counted(text, "dsv4:request_errors_total", code="invalid_value", **whose) == 1
    for status in ("200", "400"):
        where = {"path": "/v1/chat/completions", "status": status, **whose}
        assert counted(text, "dsv4:http_request_duration_seconds_count", **where) == 1
    assert counted(text, "dsv4:reasoning_tokens_total", **whose) == len("hm") + 1


def test_paths_nobody_serves_share_a_number(client):
    for path in ("/a", "/b", "/v1/models/x"):
        client.get(path)
    counts = [line for line in client.get("/metrics").text.splitlines() if "seconds_count" in line]
    assert any('path="other",status="404"' in line for line in counts)
    assert not any('path="/a"' in line for line in counts)


def test_guards_are_counted(client):
    service = make_service(FakeModel(f"r{C.EOS}", f"x{C.EOS}"))
    with TestClient(create_app(service)) as client:
        client.post("/v1/chat/completions", json=ASK)
        text = client.get("/metrics").text
    assert counted(text, "dsv4:guard_interventions_total", guard="closed_reasoning") == 1
    assert json.loads(client.get("/openapi.json").text)["openapi"].startswith("3.")
