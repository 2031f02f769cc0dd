"""The description at /openapi.json, held against what the server does."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from dsv4_jax.serving import api
from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.openapi import document
from dsv4_jax.serving.schema import read_chat_request
from tests.serving.fakes import MODEL, FakeModel, answer, make_service
from tests.serving.live import serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(make_service(FakeModel(answer("fine")), parallel=2)) as address:
        yield address


def described() -> Iterator[tuple[str, str]]:
    for path, item in document("", False)["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield method.upper(), path


def test_every_route_is_described_and_nothing_else():
    app = api.create_app(make_service(FakeModel("x")))
    assert isinstance(app, api._Outermost)
    routes: list[Route] = app.app.routes  # type: ignore[attr-defined]
    served = {
        (method, route.path.replace(":path", ""))
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert set(described()) | {("GET", "/openapi.json")} == served


def test_keys_are_described():
    assert "security" not in document("1", False)
    assert document("1", True)["security"] == [{"key": []}]


def violations(path: str, body: bytes) -> list[str]:
    """How a body breaks the description."""
    described = document("", False)
    operation = described["paths"][path]["post"]
    asked = operation["requestBody"]["content"]["application/json"]["schema"]
    judge = jsonschema.Draft202012Validator({**described, **asked})
    return [error.message for error in judge.iter_errors(json.loads(body))]


def fuzz(address: str, path: str, mode: GenerationMode, count: int) -> set[int]:
    """Sends requests made from the description; returns the statuses that came back.

    What is accepted must keep to the description: not all that is meant to be wrong is, as other
    fields or another alternative may make up for it.
    """
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    (operation,) = [found.ok() for found in schema.get_all_operations() if found.ok().path == path]

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = MODEL  # any other is a 404 and nothing else
        reply = case.call_and_validate(checks=CHECKS, timeout=60)
        statuses.add(reply.status_code)
        if mode is GenerationMode.NEGATIVE and reply.status_code == 200:
            sent = reply.request.body
            assert not violations(path, sent), f"accepted {sent!r}: {violations(path, sent)}"

    statuses: set[int] = set()
    check()
    return statuses


PATHS = sorted({path for _, path in described()} - {"/chat/completions", "/completions"})
# Draining would end the server of the other tests; it takes nothing that could be wrong.
BODIES = [path for path in PATHS if not path.startswith(("/beta", "/anthropic", "/admin/drain"))]


ROLES = ("system", "developer", "user", "assistant", "tool")
CALL = {"function": {"name": "f", "arguments": "{}"}}
WRONG_IN_MESSAGES = [
    {"tool_calls": ""},
    {"tool_calls": [None]},
    {"tool_calls": [{}]},
    {"tool_calls": [{**CALL, "id": 5}]},
    {"tool_calls": [{**CALL, "type": "custom"}]},
    {"tool_calls": [{"function": {"name": "f", "arguments": False}}]},
    {"tool_calls": [{"function": {"name": None}}]},
    {"tool_call_id": 5},
    {"reasoning": []},
    {"reasoning_content": {}},
    {"prefix": "yes"},
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("wrong", WRONG_IN_MESSAGES, ids=json.dumps)
def test_fields_a_role_does_not_use_are_checked_too(role, wrong):
    messages = [{"role": role, "content": "a"} | wrong, {"role": "user", "content": "b"}]
    body = {"messages": messages}
    assert violations("/tokenize", json.dumps(body).encode())
    with pytest.raises(ApiError) as caught:
        read_chat_request(body)
    assert caught.value.status == 400 and str(caught.value.param).startswith("messages[0].")


WRONG_ELSEWHERE = [
    ("/tokenize", {"prompt": "a", "add_special_tokens": True, "add_bos": 1}),
    ("/tokenize", {"prompt": "a", "add_special_tokens": "yes"}),
    ("/v1/chat/render", {"response_format": {"type": "text", "json_schema": {"schema": 0}}}),
    ("/v1/chat/render", {"response_format": {"type": "text", "regex": 0}}),
    ("/v1/chat/render", {"chat_template_kwargs": {"thinking": True, "enable_thinking": 1}}),
    ("/v1/messages", {"output_config": {"format": {}}}),
    ("/v1/messages", {"output_config": {"format": {"type": "json_schema"}}}),
    ("/v1/messages", {"thinking": {"type": "disabled", "budget_tokens": "a"}}),
    ("/v1/messages", {"tools": [{"name": "f"}]}),
    ("/v1/messages", {"tool_choice": {}}),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("/v1/messages", {"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}),
]


@pytest.mark.parametrize(("path", "wrong"), WRONG_ELSEWHERE)
def test_what_breaks_the_description_is_refused(address, path, wrong):
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8}
    body = {"model": MODEL, **({} if path == "/tokenize" else chat)} | wrong
    assert violations(path, json.dumps(body).encode())
    assert httpx.post(f"{address}{path}", json=body).status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_a_few_requests(address, path, mode):
    fuzz(address, path, mode, 4)


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_many_requests(address, path, mode):
    has_body = "requestBody" in document("", False)["paths"][path].get("post", {})
    if mode is GenerationMode.NEGATIVE and not has_body:
        pytest.skip("nothing can be wrong with it")
    wanted = {200 if mode is GenerationMode.POSITIVE else 400} if has_body else set()
    statuses = fuzz(address, path, mode, 100 if has_body else 5)
    if not wanted <= statuses:  # most messages made at random contradict themselves
        statuses |= fuzz(address, path, mode, 1000)
    assert wanted <= statuses
    assert httpx.get(f"{address}/health").status_code == 200
