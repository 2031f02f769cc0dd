"""Routes, headers and errors around the chat endpoint."""

import re
from html.parser import HTMLParser

import pytest
from starlette.testclient import TestClient

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.api import create_app
from dsv4_jax.serving.service import Service, Settings
from tests.serving.fakes import MODEL, FakeModel, answer, ids, make_service, prompt_text

ASK = {"messages": [{"role": "user", "content": "q"}]}


@pytest.fixture(scope="module")
def client():
    service = make_service(FakeModel(answer("hi")))
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


def test_health_and_version(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/version").json()["version"]


def test_ready_and_loading():
    service = Service(Settings((MODEL,), notice="noise"))
    with TestClient(create_app(service)) as client:
        reply = client.get("/ready")
        assert reply.status_code == 503
        state = {"phase": "loading", "percent": 0, "notice": "noise", "examples": []}
        assert reply.json() == state
        assert client.get("/health").status_code == 200
        for reply in (client.post("/v1/chat/completions", json=ASK), client.get("/v1/models")):
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "loading"
            assert int(reply.headers["retry-after"]) > 0
        made = make_service(FakeModel(answer("hi")))
        loaded = made.loaded()
        service.ready(loaded.planner, loaded.model, loaded.fingerprint)
        assert client.get("/ready").json()["phase"] == "ready"
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200


@pytest.mark.parametrize("prefix", ["/v1", "", "/beta"])
def test_aliases(client, prefix):
    reply = client.post(f"{prefix}/chat/completions", json=ASK)
    assert reply.json()["choices"][0]["message"]["content"] == "hi"
    assert reply.json()["model"] == MODEL
    assert reply.json()["system_fingerprint"] == "fp_fake"


@pytest.mark.parametrize("name", [MODEL, "alias", "deepseek-chat", "deepseek-reasoner"])
def test_names(client, name):
    assert client.post("/v1/chat/completions", json=ASK | {"model": name}).json()["model"] == name
    assert client.get(f"/v1/models/{name}").json()["id"] == name


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/a/b", 404, "model_not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "invalid_request"),
        ("POST", "/health", 405, "invalid_request"),
        ("DELETE", "/v1/models", 405, "invalid_request"),
    ],
)
def test_unknown_paths_and_methods(client, method, path, status, code):
    reply = client.request(method, path)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code)
    assert error.keys() == {"message", "type", "param", "code"}
    assert ("allow" in reply.headers) == (status == 405)


def test_server_info(client):
    info = client.get("/v1/server_info").json()
    assert (info["models"], info["prompt_profile"]) == ([MODEL, "alias"], "official")
    assert info["system_fingerprint"] == "fp_fake"


def test_request_ids(client):
    mine = client.get("/health", headers={"x-request-id": "abc-1"})
    assert mine.headers["x-request-id"] == "abc-1"
    given = [client.get("/health").headers["x-request-id"] for _ in range(2)]
    assert given[0] != given[1]
    long = client.get("/health", headers={"x-request-id": "x" * 500})
    assert len(long.headers["x-request-id"]) < 40


def test_bugs_are_hidden_from_clients_and_logged(monkeypatch, caplog):
    service = make_service(FakeModel(answer("hi")))
    monkeypatch.setattr(service, "model_name", lambda asked: {}["secret"])
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        reply = client.post("/v1/chat/completions", json=ASK, headers={"x-request-id": "r1"})
        assert client.get("/health").status_code == 200
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "r1" in reply.json()["error"]["message"]
    assert "secret" not in reply.text
    assert "secret" in caplog.text


def test_warning_header(client):
    reply = client.post("/v1/chat/completions", json=ASK | {"reasoning_effort": "max"})
    assert "tokens" in reply.headers["x-dsv4-warning"]
    assert "x-dsv4-warning" not in client.post("/v1/chat/completions", json=ASK).headers


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_from_elsewhere_and_runs_only_its_own_script(client):
    reply = client.get("/")
    assert reply.headers["content-type"].startswith("text/html")
    links = _Links()
    links.feed(reply.text)
    assert all(link.startswith("data:") for link in links.found)
    assert "://" not in reply.text
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", reply.text)
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_health_turns_bad_when_the_model_failed():
    service = make_service(model := FakeModel(answer("hi")))
    with TestClient(create_app(service)) as client:
        assert client.get("/health").status_code == 200
        model.failure = RuntimeError("boom")
        assert client.get("/health").status_code == 503


def test_metrics_are_prometheus_text():
    with TestClient(create_app(make_service(FakeModel(answer("hi"))))) as client:
        reply = client.get("/metrics")
    assert reply.status_code == 200
    assert "# TYPE dsv4:generation_tokens_total counter" in reply.text


def test_each_url_is_asked_about_by_itself():
    said = []

    def say(prompt):
        said.append(prompt_text(prompt))
        return f"{'yes' if '//b' in said[-1] else 'no'}{C.EOS}"

    ask = ASK | {"task": "read_url", "extracted_urls": ["http://a", "http://b"]}
    with TestClient(create_app(make_service(FakeModel(say)))) as client:
        reply = client.post("/v1/chat/completions", json=ask).json()
        assert [c["message"]["content"] for c in reply["choices"]] == ["no", "yes"]
        assert reply["usage"]["prompt_tokens"] == sum(len(ids(prompt)) for prompt in said)
        refused = client.post("/v1/chat/render", json=ask)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "extracted_urls")
