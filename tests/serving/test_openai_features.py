"""What the official client can ask for beside plain chats, against a real server."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from dsv4_jax.encoding import constants as C
from tests.serving.completions import block, invoke, text_parameter
from tests.serving.fakes import (
    MODEL,
    PATIENCE_S,
    FakeModel,
    answer,
    chat_answer,
    ids,
    logprob,
    make_service,
)
from tests.serving.live import serving

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
OFF = {"extra_body": {"thinking": {"type": "disabled"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel("unused")


@pytest.fixture(scope="module")
def address(model: FakeModel) -> Iterator[str]:
    with serving(make_service(model, parallel=4)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def fresh(model: FakeModel) -> None:
    model.streams.clear()
    model.sampling.clear()
    model.cached_tokens = 0


# Several answers


def test_four_answers(client, model):
    model.says, model.cached_tokens = [answer("same")], 3
    reply = client.chat.completions.create(**ASK, n=4, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert {choice.message.content for choice in reply.choices} == {"same"}
    assert reply.usage.completion_tokens == 4 * len(ids(model.says[0]))
    assert reply.usage.prompt_tokens == len(model.streams[0].given["prompt_ids"])
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    seeds = {sampling.seed for sampling in model.sampling}
    assert len(seeds) == 4 and 7 in seeds
    leader = next(stream for stream in model.streams if stream.given["after"] is None)
    assert all(stream.given["after"] in (None, leader) for stream in model.streams)
    assert sum(stream.given["after"] is leader for stream in model.streams) == 3


def test_four_streamed_answers(client, model):
    model.says = [answer("a b", reasoning="r")]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**ASK, n=4, **options))
    texts, ends = [""] * 4, [""] * 4
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert not ends[choice.index], "an answer went on behind its end"
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ""
    assert (texts, ends) == (["a b"] * 4, ["stop"] * 4)
    assert chunks[-1].usage.completion_tokens == 4 * len(ids(model.says[0]))


def test_seeds_are_repeated(client, model):
    model.says = [answer("x")]
    for _ in range(2):
        client.chat.completions.create(**ASK, n=3, seed=11)
    seeds = sorted(sampling.seed for sampling in model.sampling)
    assert seeds[0::2] == seeds[1::2]


# Log-probabilities


def test_logprobs(client, model):
    model.says = [answer("Hé\n\n", reasoning="r ")]
    reply = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    got = reply.choices[0].logprobs
    for entries, text in ((got.content, "Hé\n\n"), (got.to_dict()["reasoning_content"], "r ")):
        entries = [entry if isinstance(entry, dict) else entry.to_dict() for entry in entries]
        assert bytes(byte for entry in entries for byte in entry["bytes"]) == text.encode()
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
        assert all(entry["logprob"] <= 0 for entry in entries)
    (token,) = ids("H")
    assert got.content[0].token == "H"
    assert got.content[0].logprob == logprob(token)
    assert model.sampling[-1].logprobs == 2


def test_streamed_logprobs_are_those_of_the_whole_answer(client, model):
    model.says = [answer("one two", reasoning="three")]
    asked = {**ASK, "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.to_dict()
    streamed: dict[str, list[Any]] = {"content": [], "reasoning_content": []}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for kind, entries in streamed.items():
            found = chunk.choices[0].logprobs
            entries += (found.to_dict().get(kind) or []) if found else []
    assert streamed == {kind: whole[kind] for kind in streamed}


def test_markup_and_stop_strings_have_no_logprobs(client, model):
    model.says = [answer(f"ok\n\n{block(invoke('add'))}")]
    reply = client.chat.completions.create(**ASK, tools=[TOOL], logprobs=True)
    assert [entry.token for entry in reply.choices[0].logprobs.content] == ["o", "k"]
    model.says = [answer("abSTOPc")]
    reply = client.chat.completions.create(**ASK, stop="STOP", logprobs=True)
    assert [entry.token for entry in reply.choices[0].logprobs.content] == ["a", "b"]


def test_without_logprobs_there_are_none(client, model):
    model.says = [answer("x")]
    assert client.chat.completions.create(**ASK).choices[0].logprobs is None


# Sampling and stopping


def test_sampling_fields_reach_the_model(client, model):
    model.says = [answer("x")]
    asked = {"presence_penalty": 1.5, "frequency_penalty": -1, "logit_bias": {"5": -100, "6": 1}}
    more = {"min_p": 0.2, "repetition_penalty": 1.1}
    client.chat.completions.create(**ASK, **asked, extra_body=more, user="me")
    got = model.sampling[-1]
    assert (got.presence_penalty, got.frequency_penalty) == (1.5, -1)
    assert (got.min_p, got.repetition_penalty) == (0.2, 1.1)
    assert got.logit_bias == ((5, -100.0), (6, 1.0))
    assert model.streams[-1].given["tenant"].endswith(":me")
    with pytest.raises(openai.BadRequestError, match="not a token"):
        client.chat.completions.create(**ASK, logit_bias={"320": 1})


def test_ways_to_stop(client, model):
    model.says = [answer("one END two", reasoning="an END")]
    body = {"include_stop_str_in_output": True}
    reply = client.chat.completions.create(**ASK, stop="END", extra_body=body)
    assert reply.choices[0].message.content == "one END"
    body = {"stop_in_reasoning": True}
    reply = client.chat.completions.create(**ASK, stop="END", extra_body=body)
    assert (reply.choices[0].message.reasoning, reply.choices[0].message.content) == ("an ", "")
    assert reply.choices[0].finish_reason == "stop"
    body = {"stop_token_ids": ids("w")}
    reply = client.chat.completions.create(**ASK, extra_body=body)
    assert reply.choices[0].message.content == "one END t"
    assert reply.choices[0].finish_reason == "stop"


# Structured output


class Step(pydantic.BaseModel):
    explanation: str
    done: bool


class Solution(pydantic.BaseModel):
    steps: list[Step]
    result: int


def test_parse_with_a_schema(client, model):
    model.says = [answer('{"steps": [{"explanation": "é", "done": true}], "result": 4}')]
    parsed = client.chat.completions.parse(**ASK, response_format=Solution)
    message = parsed.choices[0].message
    assert message.parsed == Solution(steps=[Step(explanation="é", done=True)], result=4)
    assert message.reasoning == "hm"
    prompt = model.streams[0].given["prompt_ids"]
    assert ids("## Response Format")[0] in prompt
    assert [stream.given["guide"] is None for stream in model.streams] == [True, False]


@pytest.mark.parametrize("is_thinking", [True, False])
def test_a_model_that_would_not_write_json_has_to(client, model, is_thinking):
    model.says = [answer("I would rather chat") if is_thinking else chat_answer("No.")]
    asked = {**ASK, **({} if is_thinking else OFF)}
    reply = client.chat.completions.create(
        **asked, response_format={"type": "json_object"}, max_tokens=400
    )
    assert reply.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_reasoning_that_does_not_end_is_closed_before_the_grammar(client, model):
    model.says = [f"thinking{C.EOS}", chat_answer('{"a": 1}')]
    reply = client.chat.completions.create(**ASK, response_format={"type": "json_object"})
    assert reply.choices[0].message.content == '{"a": 1}'


@pytest.mark.parametrize(
    ("schema", "problem"),
    [({"not": {}}, "not"), ({"type": "object", "properties": {"a": {"type": "what"}}}, "what")],
)
def test_schemas_that_cannot_be_followed_are_refused(client, schema, problem):
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=problem) as caught:
        client.chat.completions.create(**ASK, response_format=asked)
    assert caught.value.code == "invalid_schema"
    assert caught.value.param == "response_format.json_schema.schema"


def test_a_strict_tool_that_cannot_be_followed_is_refused_and_another_is_not(client, model):
    model.says = [answer("fine")]
    function = {"name": "f", "parameters": {"properties": {"a": {"not": {}, "type": "integer"}}}}
    tools = [{"type": "function", "function": function}]
    assert client.chat.completions.create(**ASK, tools=tools).choices
    tools = [{"type": "function", "function": function | {"strict": True}}]
    with pytest.raises(openai.BadRequestError, match="not supported: not") as caught:
        client.chat.completions.create(**ASK, tools=tools)
    assert caught.value.param == "tools[0].function.parameters"


# Tools

NAMED = {"type": "function", "function": {"name": "add"}}
WANTED = block(invoke("add", text_parameter("a", "1")))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choice", ["auto", "required", NAMED, "none"], ids=str)
def test_a_loop_of_five_turns(client, model, choice, stream):
    messages: list[Any] = [{"role": "user", "content": "count"}]
    for turn in range(5):
        must_call = choice not in ("auto", "none")
        calls = choice != "none" and (must_call or turn < 4)
        model.says = [answer(WANTED if choice == "auto" and turn < 4 else "Done.", reasoning="r")]
        asked = {"model": MODEL, "messages": messages, "tools": [TOOL], "max_tokens": 600}
        if stream:
            with client.chat.completions.stream(**asked, tool_choice=choice) as events:
                reply = events.get_final_completion()
        else:
            reply = client.chat.completions.create(**asked, tool_choice=choice)
        message = reply.choices[0].message
        assert message.to_dict()["reasoning"] == "r"
        assert bool(message.tool_calls) == calls
        messages.append(message.model_dump(exclude_none=True))
        if not calls:
            assert message.content == "Done." and reply.choices[0].finish_reason == "stop"
            messages.append({"role": "user", "content": "more"})
            continue
        assert reply.choices[0].finish_reason == "tool_calls"
        for call in message.tool_calls:
            assert call.function.name == "add"
            assert set(json.loads(call.function.arguments)) <= {"a"}
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "2"})


def test_one_call_at_a_time(client, model):
    model.says = [answer(block(invoke("add"), invoke("add")))]
    asked = {**ASK, "tools": [TOOL]}
    assert len(client.chat.completions.create(**asked).choices[0].message.tool_calls) == 2
    reply = client.chat.completions.create(**asked, parallel_tool_calls=False)
    assert len(reply.choices[0].message.tool_calls) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}, "tools": [TOOL]}, None),
        (
            {
                "tool_choice": "required",
                "tools": [TOOL],
                "response_format": {"type": "json_object"},
            },
            "response_format",
        ),
    ],
    ids=str,
)
def test_choices_that_contradict_the_tools(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASK, **fields)
    assert caught.value.param == (param or "tool_choice.function.name")


def test_prefix_and_grammar_exclude_each_other(client):
    messages = [*ASK["messages"], {"role": "assistant", "content": "{", "prefix": True}]
    with pytest.raises(openai.BadRequestError, match="continued"):
        client.chat.completions.create(
            model=MODEL, messages=messages, response_format={"type": "json_object"}
        )


def test_calls_inside_reasoning_are_held_to_the_tools_too(client, model):
    model.says = [f"hm\n\n{block(invoke('nope'))}{C.EOS}"]
    reply = client.chat.completions.create(**ASK, tools=[TOOL], max_tokens=600)
    names = {call.function.name for call in reply.choices[0].message.tool_calls}
    assert names == {"add"}


# Plain completions


def test_completion(client, model):
    model.says = [chat_answer(" world")]
    reply = client.completions.create(model=MODEL, prompt="Hello", seed=1)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (" world", "stop")
    assert reply.object == "text_completion"
    assert model.streams[-1].given["prompt_ids"] == ids(f"{C.BOS}Hello")
    assert model.sampling[-1].max_tokens == 16
    reply = client.completions.create(model=MODEL, prompt=ids("Hello"))
    assert model.streams[-1].given["prompt_ids"] == ids("Hello")


def test_several_prompts_with_several_answers(client, model):
    model.says = [lambda prompt: chat_answer(f"<{len(prompt)}>")]
    reply = client.completions.create(model=MODEL, prompt=["a", "bb"], n=2, echo=True)
    assert [choice.text for choice in reply.choices] == ["a<2>", "a<2>", "bb<3>", "bb<3>"]
    assert reply.usage.prompt_tokens == 5


def test_scoring_a_prompt(client, model):
    model.says = [""]
    asked = {"model": MODEL, "max_tokens": 0, "echo": True, "logprobs": 2}
    (choice,) = client.completions.create(prompt="abc", **asked).choices
    assert choice.text == "abc"
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs == [logprob(token) for token in ids("abc")]
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert all(len(best) == 2 for best in choice.logprobs.top_logprobs)
    (choice,) = client.completions.create(prompt=ids("abc"), **asked).choices
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == [logprob(token) for token in ids("bc")]


def test_echo_without_logprobs_asks_nothing_of_the_model(client, model):
    (choice,) = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=0, echo=True
    ).choices
    assert (choice.text, choice.logprobs, model.streams) == ("abc", None, [])


def test_filling_a_hole(client, model):
    model.says = [chat_answer("x + 1")]
    client.completions.create(model=MODEL, prompt="def f(x): return ", suffix="\n")
    text = f"{C.BOS}{C.FIM_BEGIN}def f(x): return {C.FIM_HOLE}\n{C.FIM_END}"
    assert model.streams[-1].given["prompt_ids"] == ids(text)


def test_streamed_completion(client, model):
    model.says = [chat_answer("one STOP two")]
    asked = {"model": MODEL, "prompt": "p", "stop": "STOP", "logprobs": 0, "echo": True}
    (whole,) = client.completions.create(**asked).choices
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, usage = client.completions.create(**asked, **options)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.text == "pone "
    offsets = [offset for p in pieces for offset in p.choices[0].logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset == list(range(5))
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason == "stop"
    assert usage.usage.completion_tokens == len("one STOP")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt[1]"),
        ({"prompt": [[1], [-1]]}, "prompt[1][0]"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": [5], "suffix": "x"}, "suffix"),
        ({"prompt": "x", "suffix": "x", "echo": True}, "echo"),
        ({"prompt": "x", "max_tokens": 10**6}, "max_tokens"),
    ],
    ids=str,
)
def test_wrong_completions(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": MODEL, **fields}, cast_to=object)
    assert caught.value.param == param


# Asynchronous clients, errors


def test_async_streams_side_by_side(address, model):
    model.says = [answer("async")]

    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(**ASK, stream=True, n=2)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client) for _ in range(4)))

    texts = asyncio.run(all_of_them())
    assert [sorted(text) for text in texts] == [sorted("asyncasync")] * 4


def test_a_full_queue_and_a_stopping_server_have_their_exceptions():
    gate = threading.Semaphore(0)
    model = FakeModel(answer("x"), gate=gate)
    service = make_service(model, max_waiting=0)
    with serving(service) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
            stream = threading.Thread(target=client.chat.completions.create, kwargs=ASK)
            stream.start()
            assert model.started.wait(PATIENCE_S)
            with pytest.raises(openai.RateLimitError) as full:
                client.chat.completions.create(**ASK)
            assert int(full.value.response.headers["retry-after"]) > 0
            for _ in range(10):
                gate.release()
            stream.join(PATIENCE_S)
            service.thread.stop()
            with pytest.raises(openai.InternalServerError) as stopping:
                client.chat.completions.create(**ASK)
            assert stopping.value.status_code == 503


def test_the_client_tries_again_when_told_to(model):
    service = make_service(FakeModel(answer("x")), max_waiting=0)
    refusals = iter([True])
    check_room = service.thread.check_room

    def refuse_once() -> None:
        if next(refusals, False):
            service.thread.retry_after_s, before = 0, service.thread.admitted
            service.thread.admitted = 99
            try:
                check_room()
            finally:
                service.thread.admitted = before
        check_room()

    service.thread.check_room = refuse_once
    with serving(service) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=1) as client:
            assert client.chat.completions.create(**ASK).choices[0].message.content == "x"
