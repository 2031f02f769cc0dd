"""The official client against a real server."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.serving.completions import block, invoke, json_parameter, text_parameter
from tests.serving.fakes import MODEL, FakeModel, answer, chat_answer, ids, make_service
from tests.serving.live import serving

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
OFF = {"thinking": {"type": "disabled"}}
TOOLS = [{"type": "function", "function": {"name": name}} for name in "fg"]


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel("unused")


@pytest.fixture(scope="module")
def address(model: FakeModel) -> Iterator[str]:
    with serving(make_service(model)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_whole_answer(client, model):
    model.says = [answer("Héllo 😀", reasoning="let me see")]
    reply = client.chat.completions.create(**ASK)
    message = reply.choices[0].message
    assert reply.object == "chat.completion"
    assert reply.model == MODEL
    assert reply.choices[0].finish_reason == "stop"
    assert message.content == "Héllo 😀"
    assert message.reasoning_content == message.reasoning == "let me see"
    assert message.tool_calls is None
    usage = reply.usage
    assert usage.prompt_tokens == len(model.prompts[-1])
    assert usage.completion_tokens == len(ids(model.says[0]))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details.reasoning_tokens == len("let me see") + 1


def test_stream_equals_whole(client, model):
    model.says = [answer("Hello there.\n", reasoning="two  words")]
    whole = client.chat.completions.create(**ASK)
    chunks = list(
        client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    reasoning = "".join(getattr(d, "reasoning_content", "") for d in deltas)
    assert reasoning == whole.choices[0].message.reasoning_content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_helper_accumulates_tool_calls(client, model):
    arguments = [text_parameter("a", 'x"y\n'), json_parameter("b", "[1]")]
    model.says = [answer("Look.\n\n" + block(invoke("f", *arguments), invoke("g")))]
    with client.chat.completions.stream(**ASK, tools=TOOLS) as stream:
        final = stream.get_final_completion()
    choice = final.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Look."
    first, second = choice.message.tool_calls
    assert (first.function.name, second.function.name) == ("f", "g")
    assert json.loads(first.function.arguments) == {"a": 'x"y\n', "b": [1]}
    assert second.function.arguments == "{}"
    assert first.id.startswith("call_") and len(first.id) == len("call_") + 24
    assert first.id != second.id


def test_tool_loop(client, model):
    model.says = [answer(block(invoke("f", text_parameter("a", "x"))), reasoning="why")]
    message = client.chat.completions.create(**ASK, tools=TOOLS).choices[0].message
    assert message.content is None
    model.says = [answer("Done.")]
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"}
    history = [*ASK["messages"], message.model_dump(exclude_none=True), result]
    reply = client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS)
    assert reply.choices[0].message.content == "Done."
    assert reply.choices[0].finish_reason == "stop"


def test_length(client, model):
    model.says = [chat_answer("0123456789")]
    reply = client.chat.completions.create(**ASK, max_tokens=4, extra_body=OFF)
    assert reply.choices[0].message.content == "0123"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 4


def test_stop_string(client, model):
    model.says = [answer("one END two", reasoning="END")]
    reply = client.chat.completions.create(**ASK, stop=["END", "never"])
    assert reply.choices[0].message.content == "one "
    assert reply.choices[0].message.reasoning == "END"
    assert reply.choices[0].finish_reason == "stop"


def test_sampling_reaches_the_model(client, model):
    model.says = [answer("x")]
    more = {"top_k": 7}
    client.chat.completions.create(
        **ASK, temperature=0.5, top_p=0.9, seed=-3, max_completion_tokens=9, extra_body=more
    )
    got = model.sampling[-1]
    assert (got.temperature, got.top_p, got.top_k, got.seed, got.max_tokens) == (0.5, 0.9, 7, -3, 9)


def test_models(client):
    listed = list(client.models.list())
    assert [model.id for model in listed] == [MODEL, "alias"]
    assert client.models.retrieve("alias").max_model_len == listed[0].max_model_len


def test_errors_become_the_clients_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(**{**ASK, "model": "gpt"})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASK, temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")


def test_a_failing_model_is_a_500_and_the_next_request_works(client, model):
    model.says, model.fails_after = [answer("x")], 0
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**ASK)
    assert "broke" not in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**ASK, stream=True)
    model.fails_after = 4
    with pytest.raises(openai.APIError, match="its log says why"):
        list(client.chat.completions.create(**ASK, stream=True))
    model.fails_after = None
    assert client.chat.completions.create(**ASK).choices[0].message.content == "x"


async def _ask(address: str) -> str | None:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(**ASK, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_async_client(address, model):
    model.says = [answer("async")]
    assert asyncio.run(_ask(address)) == "async"


def test_keys():
    with serving(make_service(FakeModel(answer("x")), api_keys=("k1", "k2"))) as address:
        for key in ("k1", "k2"):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client:
                assert client.chat.completions.create(**ASK).choices
        with openai.OpenAI(base_url=f"{address}/v1", api_key="k3") as client:
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(**ASK)
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"x-api-key": "k2"}).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200
