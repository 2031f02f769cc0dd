"""Hostile and broken requests: a clean 4xx each, and a server that goes on answering."""

import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from dsv4_jax.serving import http11
from tests.serving.fakes import MAX_LEN, PATIENCE_S, FakeModel, answer, make_service
from tests.serving.live import serving

PATH = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "q"}]}
JSON = {"content-type": "application/json"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(make_service(FakeModel(answer("fine")), max_body_bytes=2 * MIB)) as address:
        yield address


@pytest.fixture(autouse=True)
def still_answers(address: str) -> Iterator[None]:
    yield
    reply = httpx.post(address + PATH, json=ASK, timeout=PATIENCE_S)
    assert reply.json()["choices"][0]["message"]["content"] == "fine"


def check_error(reply: httpx.Response, status: int, code: str) -> dict[str, str]:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code), error
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1000
    return error


def post(address: str, content: bytes, headers: dict[str, str] = JSON) -> httpx.Response:
    return httpx.post(address + PATH, content=content, headers=headers, timeout=PATIENCE_S)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": [}',
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": "\x00"}',
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": -Infinity, "messages": []}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\udc00": 1, "messages": []}',
        b'{"x": ' + b"9" * 5000 + b"}",
        b'{"x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"x": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"a":' * 10_000,
    ],
    ids=lambda body: body[:30].decode("latin-1"),
)
def test_not_json(address, body):
    check_error(post(address, body), 400, "invalid_json")


@pytest.mark.parametrize("depth", [1, 30, 62])
def test_reasonable_nesting_passes(address, depth):
    body = json.dumps(ASK)[:-1].encode() + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
    assert post(address, body).status_code == 200


def test_escaped_nul_and_paired_surrogates_are_text(address):
    body = b'{"messages": [{"role": "user", "content": "\\u0000 \\ud83d\\ude00"}]}'
    assert post(address, body).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_content_type(address, kind):
    reply = post(address, json.dumps(ASK).encode(), {"content-type": kind})
    check_error(reply, 415, "unsupported_media_type")


def test_content_type_with_charset(address):
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert post(address, json.dumps(ASK).encode(), kind).status_code == 200


def test_body_too_large(address):
    check_error(post(address, b" " * (3 * MIB)), 413, "body_too_large")


def test_body_too_large_in_chunks(address):
    pieces = (b" " * MIB for _ in range(3))
    reply = httpx.post(address + PATH, content=pieces, headers=JSON, timeout=PATIENCE_S)
    check_error(reply, 413, "body_too_large")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"max_tokens": 10**12}, "context_length_exceeded", "max_tokens"),
        ({"n": -1}, "invalid_value", "n"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"logit_bias": {"1": 1e9}}, "invalid_value", "logit_bias.1"),
        ({"messages": []}, "invalid_message_order", "messages"),
        ({"messages": [{"role": "root", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [None]}, "invalid_value", "messages[0]"),
        ({"tools": [{}] * 1000}, "invalid_value", "tools"),
        ({"stop": ["x"] * 1000}, "invalid_value", "stop"),
    ],
    ids=str,
)
def test_fields(address, fields, code, param):
    reply = httpx.post(address + PATH, json=ASK | fields, timeout=PATIENCE_S)
    assert check_error(reply, 400, code)["param"] == param


@pytest.mark.parametrize("name", ["gpt-4", "", "x" * 10_000, "../../etc/passwd"])
def test_unknown_model(address, name):
    reply = httpx.post(address + PATH, json=ASK | {"model": name}, timeout=PATIENCE_S)
    check_error(reply, 404, "model_not_found")


def test_a_prompt_far_too_long(address):
    long = [{"role": "user", "content": "word " * 300_000}]
    reply = httpx.post(address + PATH, json={"messages": long}, timeout=PATIENCE_S)
    error = check_error(reply, 400, "context_length_exceeded")
    assert str(MAX_LEN) in error["message"]


def test_a_huge_schema(address):
    function = {"name": "f", "parameters": {"description": "x" * MIB}}
    tools = [{"type": "function", "function": function}]
    reply = httpx.post(address + PATH, json=ASK | {"tools": tools}, timeout=PATIENCE_S)
    check_error(reply, 400, "context_length_exceeded")


def test_a_recursive_schema_is_only_text(address):
    function = {"name": "f", "parameters": {"$ref": "#"}}
    tools = [{"type": "function", "function": function}]
    assert httpx.post(address + PATH, json=ASK | {"tools": tools}).status_code == 200


JSON_SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"allOf": [{"anyOf": [{"type": "object"}] * 9}] * 9},
        {"type": "string", "pattern": "(a"},
        {"type": 5},
        {"properties": []},
        {"required": "a"},
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_schemas(address, schema):
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = ASK | {"response_format": asked, "max_tokens": 30}
    reply = httpx.post(address + PATH, json=body, timeout=PATIENCE_S)
    if reply.status_code != 200:
        assert check_error(reply, 400, "invalid_schema")["param"] == JSON_SCHEMA


@pytest.mark.parametrize("kind", ["regex", "grammar"])
@pytest.mark.parametrize(
    "text",
    ["(" * 1000, "(a*)*(b*)*c", "((a{1,99}){1,99}){1,99}", "\\", "%%%", "start: start", "/", "\n"],
    ids=lambda text: text[:20],
)
def test_hostile_expressions(address, kind, text):
    body = ASK | {"response_format": {"type": kind, kind: text}, "max_tokens": 30}
    reply = httpx.post(address + PATH, json=body, timeout=PATIENCE_S)
    if reply.status_code != 200:
        check_error(reply, 400, "invalid_schema")


@pytest.mark.parametrize("is_strict", [True, False])
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"$ref": "#"}}},
        {"properties": {"a": {"type": "wizard"}}},
        {"properties": {'a\n"</': {"type": "string", "enum": ["</", "\n", '"']}}},
        {"properties": {"a": {"type": "string", "pattern": "(", "minLength": -1}}},
        {"properties": {"a": {"type": "string", "minLength": "x"}}},
        {"properties": {"a": 5, "b": None, "": True}},
        {"properties": 5, "required": 5},
        {"properties": {f"p{i}": {"type": "integer"} for i in range(3000)}},
        {"properties": {f"p{i}": {"$ref": "#/properties/p0"} for i in range(3000)}},
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_tools(address, parameters, is_strict):
    function = {"name": "f", "parameters": parameters, "strict": is_strict}
    body = ASK | {"tools": [{"type": "function", "function": function}], "max_tokens": 30}
    reply = httpx.post(address + PATH, json=body, timeout=PATIENCE_S)
    if reply.status_code != 200:
        code = reply.json()["error"]["code"]
        check_error(reply, 400, code)
        assert code == "context_length_exceeded" or (is_strict and code == "invalid_schema")


# Below HTTP


def raw(address: str, *sent: bytes, end: bool = False) -> bytes:
    """Sends bytes and returns all that comes back until the server closes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.settimeout(PATIENCE_S)
        for data in sent:
            client.sendall(data)
        if end:
            client.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while data := client.recv(65536):
                received += data
        except ConnectionResetError:
            pass
        return received


BODY = json.dumps(ASK).encode()
HEAD = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
LENGTH = f"content-length: {len(BODY)}\r\n".encode()
CLOSE = b"connection: close\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"garbage\r\n\r\n",
        b"GET / HTTP/x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"x" * 70_000,
        HEAD + LENGTH + b"content-length: 5\r\n\r\n" + BODY,
        HEAD + b"content-length: -5\r\n\r\n" + BODY,
        HEAD + b"content-length: many\r\n\r\n" + BODY,
    ],
    ids=lambda data: data[:20].decode("latin-1"),
)
def test_broken_http(address, request_bytes):
    head, _, body = raw(address, request_bytes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_broken_chunks(address):
    start = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    reply = raw(address, start + b'5\r\n{"mes\r\nzz\r\nnonsense\r\n')
    assert reply == b"" or reply.startswith(b"HTTP/1.1 400 ")


def test_truncated_body(address):
    assert raw(address, HEAD + LENGTH + b"\r\n" + BODY[:-3], end=True) == b""


def test_http_1_0(address):
    reply = raw(address, HEAD.replace(b"1.1", b"1.0") + LENGTH + b"\r\n" + BODY)
    assert reply.startswith(b"HTTP/1.1 200 ")


def test_pipelining(address):
    first = HEAD + LENGTH + b"\r\n" + BODY
    reply = raw(address, first + b"GET /health HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"\r\n")
    assert reply.count(b"HTTP/1.1 200 ") == 2
    assert reply.index(b"chat.completion") < reply.index(b'{"status":"ok"}')


def test_headers_that_never_end(address, monkeypatch):
    monkeypatch.setattr(http11, "HEADER_TIMEOUT_S", 0.01)
    assert raw(address) == b""
    assert raw(address, b"GET /health HTTP/1.1\r\nhost:") == b""


def test_a_body_that_never_ends():
    service = make_service(FakeModel(answer("fine")), body_timeout_s=0.01)
    with serving(service) as address:
        reply = raw(address, HEAD + LENGTH + CLOSE + b"\r\n" + BODY[:5])
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in reply
