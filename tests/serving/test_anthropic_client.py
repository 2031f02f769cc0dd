"""The official Anthropic client against a real server."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.anthropic.request import read_messages_request
from dsv4_jax.serving.errors import ApiError
from tests.serving.completions import block, invoke, json_parameter, text_parameter
from tests.serving.fakes import (
    MODEL,
    FakeModel,
    answer,
    chat_answer,
    ids,
    make_service,
    prompt_text,
)
from tests.serving.live import serving

ASK: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 600,
    "messages": [{"role": "user", "content": "Hi"}],
}
THINK: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
TOOL: dict[str, Any] = {
    "name": "add",
    "description": "adds",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "array"}},
    },
}
CALL = block(invoke("add", text_parameter("a", 'x"é'), json_parameter("b", "[1]")))


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel("unused")


@pytest.fixture(scope="module")
def address(model: FakeModel) -> Iterator[str]:
    with serving(make_service(model, parallel=2)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def fresh(model: FakeModel) -> None:
    model.streams.clear()
    model.cached_tokens = 0


def test_whole_message(client, model):
    model.says, model.cached_tokens = [chat_answer("Hello")], 4
    reply = client.messages.create(**ASK, system="Be kind.")
    assert [block.type for block in reply.content] == ["text"]
    assert reply.content[0].text == "Hello"
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", MODEL)
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
    prompt = model.streams[-1].given["prompt_ids"]
    assert prompt_text(prompt).startswith(f"{C.BOS}Be kind.{C.USER}Hi")
    assert reply.usage.input_tokens + reply.usage.cache_read_input_tokens == len(prompt)
    assert reply.usage.cache_read_input_tokens == 4
    assert reply.usage.output_tokens == len(ids(model.says[0]))


def test_thinking(client, model):
    model.says = [answer("Hello", reasoning="let me see")]
    reply = client.messages.create(**ASK, **THINK)
    assert [block.type for block in reply.content] == ["thinking", "text"]
    assert reply.content[0].thinking == "let me see"
    assert reply.content[0].signature


def test_the_budget_is_kept(client, model):
    model.says = ["abcdefgh", chat_answer("x")]
    thinking = {"type": "enabled", "budget_tokens": 3}
    reply = client.messages.create(**ASK, thinking=thinking)
    assert reply.content[0].thinking == "abc"


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["ll", "zz"]}, "stop_sequence", "ll"),
    ],
)
def test_other_ends(client, model, fields, reason, sequence):
    model.says = [chat_answer("Hello")]
    reply = client.messages.create(**{**ASK, **fields})
    assert (reply.stop_reason, reply.stop_sequence) == (reason, sequence)


@pytest.mark.parametrize("says", [answer("Hello", reasoning="hm"), answer(f"Look.\n\n{CALL}")])
def test_the_streamed_message_is_the_whole_one(client, model, says):
    model.says = [says]
    asked = {**ASK, **THINK, "tools": [TOOL]}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    for one, other in zip(whole.content, final.content, strict=True):
        assert one.model_dump(exclude={"id"}) == other.model_dump(exclude={"id", "parsed_output"})
    assert (final.stop_reason, final.usage.output_tokens) == (
        whole.stop_reason,
        whole.usage.output_tokens,
    )
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")
    assert kinds.count("content_block_stop") == len(whole.content)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_events_are_paired_and_numbered(address, model):
    model.says = [answer(f"Look.\n\n{CALL}")]
    body = {**ASK, **THINK, "tools": [TOOL], "stream": True}
    reply = httpx.post(f"{address}/anthropic/v1/messages", json=body)
    is_open, index = False, -1
    for lines in reply.text.strip().split("\n\n"):
        kind, data = lines.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        if event["type"] == "content_block_start":
            assert not is_open
            is_open, index = True, index + 1
        elif event["type"] == "content_block_stop":
            assert is_open
            is_open = False
        if "index" in event:
            assert event["index"] == index
    assert index == 2 and not is_open


@pytest.mark.parametrize("choice", ["auto", "any", "tool", "none"])
@pytest.mark.parametrize("thinking", [{}, THINK], ids=["chat", "thinking"])
def test_a_loop_of_five_turns(client, model, choice, thinking):
    messages: list[Any] = [{"role": "user", "content": "count"}]
    named = {"name": "add"} if choice == "tool" else {}
    for turn in range(5):
        calls = choice in ("any", "tool") or (choice == "auto" and turn < 4)
        wanted = CALL if choice == "auto" and calls else "Done."
        model.says = [answer(wanted) if thinking else chat_answer(wanted)]
        reply = client.messages.create(
            **{**ASK, "messages": messages}, **thinking, tools=[TOOL],
            tool_choice={"type": choice, **named},
        )  # fmt: skip
        uses = [block for block in reply.content if block.type == "tool_use"]
        assert bool(uses) == calls
        assert reply.stop_reason == ("tool_use" if calls else "end_turn")
        messages.append({"role": "assistant", "content": reply.to_dict()["content"]})
        results = [
            {"type": "tool_result", "tool_use_id": use.id, "content": [text("2")]} for use in uses
        ]
        messages.append({"role": "user", "content": results or "more"})
    if choice == "auto":
        assert uses == []
        prompt = prompt_text(model.streams[-1].given["prompt_ids"])
        assert prompt.count("<tool_result>2</tool_result>") == 4
        assert prompt.count('name="a" string="true">x"é</') == 4


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def test_what_the_prompt_looks_like():
    ask = read_messages_request(
        {
            **ASK,
            "system": [text("S1") | {"cache_control": {"type": "ephemeral"}}, text("S2")],
            "messages": [
                {"role": "user", "content": [text("a"), text("b")]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "r", "signature": "x"},
                        {"type": "redacted_thinking", "data": "?"},
                        text("c"),
                        {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": "1"}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]},
                {"role": "assistant", "content": "It"},
            ],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "tools": [TOOL],
            "temperature": 0.5,
            "top_k": 4,
            "metadata": {"user_id": "me"},
            "thinking": {"type": "adaptive"},
            "output_config": {"effort": "max"},
        }
    )
    roles = [message["role"] for message in ask.messages]
    assert roles == ["system", "user", "user", "assistant", "tool", "assistant"]
    assert ask.messages[0]["content"] == "S1\n\nS2"
    assert ask.messages[3]["reasoning_content"] == "r"
    assert ask.messages[3]["tool_calls"][0]["function"]["arguments"] == {"a": "1"}
    assert ask.messages[-1]["prefix"] is True
    assert (ask.thinking, ask.effort, ask.user) == (True, "max", "me")
    assert ask.parallel_calls is False
    assert ask.sampling == {"temperature": 0.5, "top_k": 4}


def test_a_schema_for_the_reply(client, model):
    model.says = [chat_answer("no JSON")]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config = {"format": {"type": "json_schema", "schema": schema}}
    reply = client.messages.create(**ASK, extra_body={"output_config": config})
    assert isinstance(json.loads(reply.content[0].text), dict)


def test_counting_tokens(client, model):
    model.says = [chat_answer("x")]
    asked = {key: ASK[key] for key in ("model", "messages")}
    count = client.messages.count_tokens(**asked, tools=[TOOL]).input_tokens
    client.messages.create(**ASK, tools=[TOOL])
    assert count == len(model.streams[-1].given["prompt_ids"])


def test_async_client(address, model):
    model.says = [chat_answer("async")]

    async def ask() -> str:
        async with anthropic.AsyncAnthropic(base_url=address, api_key="none") as client:
            async with client.messages.stream(**ASK) as stream:
                return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == "async"


# Errors


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": None},
        {"temperature": 1.5},
        {"messages": []},
        {"messages": "x"},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user"}]},
        {"messages": [None]},
        {"system": 5},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"name": "a b", "input_schema": {}}]},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": {"name": "x"}},
        {"thinking": {"budget_tokens": 5}},
        {"metadata": {"user_id": "x" * 600}},
        {"output_config": {"format": {"schema": {}}}},
    ],
    ids=str,
)
def test_bad_requests(client, fields):
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.post("/v1/messages", body={**ASK, **fields}, cast_to=object)
    body = caught.value.body
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == "invalid_request_error"


def test_parameters_are_named():
    with pytest.raises(ApiError) as caught:
        read_messages_request({**ASK, "messages": [{"role": "user", "content": [{}]}]})
    assert caught.value.param == "messages[0].content[0]"


def test_other_errors(client, address, model):
    with pytest.raises(anthropic.NotFoundError, match="not served here"):
        client.messages.create(**{**ASK, "model": "claude"})
    reply = httpx.get(f"{address}/v1/messages")
    assert (reply.status_code, reply.json()["type"]) == (405, "error")
    model.says, model.fails_after = [chat_answer("x" * 9)], 0
    with pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(**ASK)
    assert caught.value.body["error"]["type"] == "api_error"
    model.fails_after = 2
    with pytest.raises(anthropic.APIStatusError, match="its log says why"):
        with client.messages.stream(**ASK) as stream:
            stream.get_final_message()
    model.fails_after = None


def test_a_stopping_server_is_overloaded():
    service = make_service(FakeModel(chat_answer("x")))
    with serving(service) as address:
        service.thread.stop()
        with anthropic.Anthropic(base_url=address, api_key="x", max_retries=0) as client:
            with pytest.raises(anthropic.InternalServerError) as caught:
                client.messages.create(**ASK)
            assert caught.value.status_code == 529
            assert caught.value.body["error"]["type"] == "overloaded_error"


def test_keys():
    with serving(make_service(FakeModel(chat_answer("x")), api_keys=("k1",))) as address:
        with anthropic.Anthropic(base_url=address, api_key="k1") as client:
            assert client.messages.create(**ASK).content
        with anthropic.Anthropic(base_url=address, api_key="k2") as client:
            with pytest.raises(anthropic.AuthenticationError):
                client.messages.create(**ASK)
