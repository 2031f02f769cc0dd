"""The description itself: every path, what it takes and what it may answer."""

from typing import Any

from dsv4_jax.serving.openapi import replies, requests
from dsv4_jax.serving.openapi.terms import TEXT, Schema, ref

_JSON, _EVENTS = "application/json", "text/event-stream"
# Without a type: tools differ in whether it is the whole text or an event.
_STREAM: Schema = {"description": "Server-sent events; the data of each is JSON, or [DONE]."}
_ERRORS = {
    400: "The request is wrong; `param` says where.",
    401: "The key is missing or wrong.",
    403: "The key is not for this.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests are waiting; `retry-after` says when to come again.",
    499: "The request was cancelled.",
    500: "A bug of the server.",
    503: "The server is loading, stopping or has failed; `retry-after` says when to come again.",
}
_OF_ANSWERS = tuple(status for status in _ERRORS if status != 403)
_OVERLOADED = 529


def _content(schema: str, is_streamed: bool = False) -> dict[str, Schema]:
    shown: dict[str, Schema] = {_JSON: {"schema": ref(schema)}}
    return shown | ({_EVENTS: {"schema": _STREAM}} if is_streamed else {})


def _errors(statuses: tuple[int, ...], schema: str) -> dict[str, Any]:
    found = {}
    for status in statuses:
        shown = _OVERLOADED if (status, schema) == (503, "MessageError") else status
        found[str(shown)] = {"description": _ERRORS[status], "content": _content(schema)}
    return found


def _post(
    summary: str, asked: str, replied: str, is_streamed: bool = False, error: str = "Error"
) -> dict[str, Any]:
    body = {"required": True, "content": _content(asked)}
    done = {"description": "The answer.", "content": _content(replied, is_streamed)}
    responses = {"200": done, **_errors(_OF_ANSWERS, error)}
    return {"post": {"summary": summary, "requestBody": body, "responses": responses}}


def _get(summary: str, replied: str, statuses: tuple[int, ...] = ()) -> dict[str, Any]:
    done = {"description": "The answer.", "content": _content(replied)}
    responses = {"200": done, **_errors(statuses, "Error")}
    return {"get": {"summary": summary, "responses": responses}}


def _other(schema: str) -> dict[str, Any]:
    return {"503": {"description": "Not now.", "content": _content(schema)}}


def _act(summary: str, replied: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    """A POST without a body."""
    done = {"description": "It is done.", "content": _content(replied)}
    responses = {"200": done, **_errors(statuses, "Error")}
    return {"post": {"summary": summary, "responses": responses}}


def _text(summary: str, kind: str) -> dict[str, Any]:
    done = {"description": "The answer.", "content": {kind: {"schema": TEXT}}}
    return {"get": {"summary": summary, "responses": {"200": done}}}


def _with_name(item: dict[str, Any]) -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    return {"parameters": [name], **item}


def _paths() -> dict[str, Any]:
    chat = _post("Answers a chat, whole or as a stream.", "ChatRequest", "Chat", True)
    plain = _post("Continues prompts.", "CompletionRequest", "Completion", True)
    message = _post("Answers a message.", "MessageRequest", "Message", True, "MessageError")
    count = _post("Counts the tokens of a message.", "CountRequest", "Count", error="MessageError")
    health, ready = _get("Whether the server works.", "Health"), _get("Its phase.", "Ready")
    health["get"]["responses"] |= _other("Health")
    ready["get"]["responses"] |= _other("Ready")
    return {
        **dict.fromkeys(("/v1/chat/completions", "/chat/completions"), chat),
        "/beta/chat/completions": chat,
        **dict.fromkeys(("/v1/completions", "/completions", "/beta/completions"), plain),
        **dict.fromkeys(("/v1/messages", "/anthropic/v1/messages"), message),
        "/v1/messages/count_tokens": count,
        "/anthropic/v1/messages/count_tokens": count,
        "/tokenize": _post("Token ids of a text or a chat.", "TokenizeRequest", "Tokens"),
        "/detokenize": _post("The text of token ids.", "DetokenizeRequest", "Text"),
        "/v1/chat/render": _post("What a chat becomes.", "ChatRequest", "Rendered"),
        "/v1/requests/{name}/cancel": _with_name(
            _act("Ends a running request.", "Cancelled", (401,))
        ),
        "/admin/drain": _act("Takes no more requests.", "Draining", (401, 403, 503)),
        "/admin/flush_cache": _act("Empties the cache of prompts.", "Flushed", (401, 403, 503)),
        "/v1/models": _get("The names this server answers under.", "Models", (401, 503)),
        "/v1/models/{name}": _with_name(_get("One of them.", "Model", (401, 404, 503))),
        "/v1/server_info": _get("What was decided at the start.", "ServerInfo", (401, 503)),
        "/health": health,
        "/ready": ready,
        "/version": _get("The version of the server.", "Version"),
        "/metrics": _text("Numbers for Prometheus.", "text/plain"),
        "/": _text("The chat page.", "text/html"),
    }


def document(version: str, needs_key: bool) -> dict[str, Any]:
    """Returns the description as OpenAPI 3.1; with `needs_key`, how to send one."""
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "dsv4_jax", "version": version},
        "paths": _paths(),
        "components": {"schemas": {**requests.SCHEMAS, **replies.SCHEMAS}},
    }
    if needs_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described
