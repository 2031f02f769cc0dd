"""The order of server-sent events, what comes between them, and how they fail."""

import json
import re
import threading
from typing import Any

import httpx
import pytest

from tests.serving.completions import block, invoke, json_parameter, text_parameter
from tests.serving.fakes import MODEL, PATIENCE_S, FakeModel, answer, chat_answer, make_service
from tests.serving.live import serving

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "q"}], "stream": True}
TOOLS = [{"type": "function", "function": {"name": name}} for name in "fg"]
USAGE = {"stream_options": {"include_usage": True}}
CALLS = block(
    invoke("f", text_parameter("a", "x\u2028y\x85"), json_parameter("b", "[1, 2]")), invoke("g")
)
COMPLETIONS = {
    "plain": answer("Hello  there\n", reasoning="one two"),
    "no reasoning": answer("x", reasoning=""),
    "no content": answer(""),
    "calls": answer(CALLS),
    "content and calls": answer(f"Look:\n\n{CALLS}\nSo."),
    "nothing": chat_answer(""),
    "odd lines": answer("a\u2028b\u2029c\x85d\r\ne\rf"),
}


def blocks(text: str) -> list[str]:
    assert text.endswith("\n\n")
    return text[:-2].split("\n\n")


def chunks(text: str) -> list[dict[str, Any]]:
    *events, done = [part for part in blocks(text) if not part.startswith(":")]
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("name", COMPLETIONS)
@pytest.mark.parametrize("with_usage", [False, True])
def test_order(name, with_usage):
    model = FakeModel(COMPLETIONS[name])
    body = ASK | {"tools": TOOLS} | (USAGE if with_usage else {})
    with serving(make_service(model)) as address:
        reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=PATIENCE_S)
        whole = httpx.post(f"{address}/v1/chat/completions", json=body | {"stream": False}).json()
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.text.splitlines() == reply.text.split("\n")[:-1]  # safe for naive line readers
    sent = chunks(reply.text)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in sent}) == 1
    if with_usage:
        last = sent.pop()
        assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(("usage" in chunk) == with_usage for chunk in sent)
    check_deltas([chunk["choices"][0] for chunk in sent], whole["choices"][0])


def check_deltas(choices: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    first, *middle, last = choices
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert (last["delta"], last["finish_reason"]) == ({}, whole["finish_reason"])
    assert all(choice["finish_reason"] is None for choice in [first, *middle])
    texts = {"reasoning_content": "", "reasoning": "", "content": ""}
    calls: list[dict[str, Any]] = []
    for delta in (choice["delta"] for choice in middle):
        assert set(delta) in ({"reasoning_content", "reasoning"}, {"content"}, {"tool_calls"})
        for key in delta.keys() & texts.keys():
            assert delta[key]
            texts[key] += delta[key]
        for call in delta.get("tool_calls", ()):
            add_call(calls, call)
    message = whole["message"]
    assert texts["content"] == (message["content"] or "")
    assert texts["reasoning"] == texts["reasoning_content"] == message.get("reasoning", "")
    expected = [call["function"] for call in message.get("tool_calls", ())]
    assert [call["function"] for call in calls] == expected
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)


def add_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    index = piece.pop("index")
    if "id" in piece:
        assert index == len(calls)
        assert piece["type"] == "function" and piece["function"]["arguments"] == ""
        calls.append(piece)
    else:
        assert index == len(calls) - 1 and piece.keys() == {"function"}
        calls[index]["function"]["arguments"] += piece["function"]["arguments"]


def test_tokens_are_sent_as_they_are_made():
    gate = threading.Semaphore(0)
    model = FakeModel(answer("ab", reasoning="r"), gate=gate)
    with serving(make_service(model)) as address:
        gate.release()
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json=ASK, timeout=PATIENCE_S
        ) as reply:
            lines = reply.iter_lines()
            assert '"role"' in next(lines)
            next(lines)
            assert '"reasoning":"r"' in next(lines)
            assert model.streamed == 1
            for _ in range(10):
                gate.release()
            assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_headers_and_comments_come_before_a_slow_first_token():
    gate = threading.Semaphore(0)
    service = make_service(
        FakeModel(answer("x"), gate=gate), hold_headers_s=0.001, keep_alive_s=0.001
    )
    with serving(service) as address:
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json=ASK, timeout=PATIENCE_S
        ) as reply:
            assert reply.status_code == 200
            pieces = reply.iter_text()
            text = next(pieces)
            told = r"[03] of \d+ tokens of the prompt are computed"
            assert re.match(rf": keep-alive\n\n: {told}\n\n", text)
            for _ in range(10):
                gate.release()
            assert chunks(text + "".join(pieces))[-1]["choices"][0]["finish_reason"] == "stop"


def test_errors_before_the_first_token_keep_their_status():
    model = FakeModel(answer("x"))
    model.fails_after = 0
    with serving(make_service(model)) as address:
        reply = httpx.post(f"{address}/v1/chat/completions", json=ASK)
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "internal_error"
        reply = httpx.post(f"{address}/v1/chat/completions", json=ASK | {"top_p": 7})
        assert reply.status_code == 400


def test_later_errors_become_an_event():
    model = FakeModel(answer("abc"))
    model.fails_after = 4
    with serving(make_service(model)) as address:
        reply = httpx.post(f"{address}/v1/chat/completions", json=ASK)
    assert reply.status_code == 200
    *_, error, done = blocks(reply.text)
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "internal_error"
