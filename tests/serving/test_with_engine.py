"""The API with a real engine behind it: a tiny model whose words are noise, so forms must hold."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import jax
import jsonschema
import openai
import pytest

from dsv4_jax import presets
from dsv4_jax.model import init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.serving.engine.loop import Engine
from dsv4_jax.serving.engine.sizing import plan_sizes
from dsv4_jax.serving.engine.waiting import QueueLimits
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.service import Service, Settings
from tests.serving.engine.conftest import metric
from tests.serving.fakes import MODEL, PATIENCE_S, tokenizer
from tests.serving.killed import kill_client
from tests.serving.live import serving

pytestmark = pytest.mark.slow
MAX_LEN, SLOTS = 2048, 3
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
OFF = {"extra_body": {"thinking": {"type": "disabled"}}}
THINK = {"thinking": {"type": "enabled", "budget_tokens": 20}}
BRIEF = {"extra_body": THINK | {"reasoning_effort": "low"}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "add", "strict": True, "parameters": SCHEMA},
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    cfg = presets.tiny().replace(max_len=MAX_LEN, vocab_size=tokenizer().vocab_size)
    params = init_params(cfg, jax.random.key(0))
    scheduling, sizes = plan_sizes(cfg, MAX_LEN, slots=SLOTS, cache_tokens=4 * MAX_LEN)
    engine = Engine(cfg, Numerics(), params, scheduling, sizes, "test")
    engine.warm_up()
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    service = Service(Settings((MODEL,), parallel=SLOTS))
    service.ready(Planner(tokenizer(), "official", MAX_LEN), engine, "fp")
    with serving(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def left_in_order(engine: Engine) -> Iterator[None]:
    yield
    while engine.scheduler.has_work:
        threading.Event().wait(0.01)
    with engine._lock:
        engine.scheduler.check()
    assert engine.failure is None
    assert metric(engine, "compilations_after_ready_total") == 0


def test_several_answers(client):
    greedy = {**ASK, **OFF, "max_tokens": 12, "temperature": 0}
    (one,) = client.chat.completions.create(**greedy).choices
    four = client.chat.completions.create(**greedy, n=4).choices
    assert {choice.message.content for choice in four} == {one.message.content}
    seeded = {**ASK, **OFF, "max_tokens": 12, "seed": 3}
    first, again = (client.chat.completions.create(**seeded, n=3).choices for _ in range(2))
    assert [c.message.content for c in first] == [c.message.content for c in again]
    assert len({choice.message.content for choice in first}) == 3
    (alone,) = client.chat.completions.create(**seeded).choices
    assert alone.message.content == first[0].message.content


def test_logprobs_of_what_is_said_and_of_the_same_as_a_prompt(client):
    said = client.completions.create(
        model=MODEL, prompt=[5, 6, 7], max_tokens=6, temperature=0, logprobs=1
    ).choices[0]
    best = [max(top.values()) for top in said.logprobs.top_logprobs]
    assert said.logprobs.token_logprobs == best
    asked = {"model": MODEL, "max_tokens": 0, "echo": True, "logprobs": 1}
    rest = [tokenizer().encode_text(text)[0] for text in said.text if text.isascii()]
    scored = client.completions.create(prompt=[5, 6, 7, *rest], **asked).choices[0]
    assert scored.logprobs.token_logprobs[0] is None
    if len(rest) == 6:
        assert scored.logprobs.token_logprobs[3:] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("how", [OFF, BRIEF], ids=["chat", "thinking"])
def test_a_schema_holds(client, how):
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    for seed in range(4):
        reply = client.chat.completions.create(
            **ASK, **how, response_format=asked, seed=seed, max_tokens=300
        )
        (choice,) = reply.choices
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


@pytest.mark.parametrize("how", [OFF, BRIEF], ids=["chat", "thinking"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_calls_that_must_be_made(client, how, choice):
    messages = list(ASK["messages"])
    for turn in range(2):
        reply = client.chat.completions.create(
            **{**ASK, "messages": messages}, **how, tools=[TOOL], tool_choice=choice,
            parallel_tool_calls=False, max_tokens=300, seed=turn,
        )  # fmt: skip
        message = reply.choices[0].message
        (call,) = message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        messages += [
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "5"},
        ]
    assert reply.usage.prompt_tokens_details.cached_tokens > 0


def test_a_grammar_that_explodes_ends_its_request_alone(client):
    regex = {"type": "regex", "regex": "((a{1,100}){1,100}){1,100}"}
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        client.chat.completions.create(
            **ASK,
            max_tokens=400,
            logit_bias={str(tokenizer().eos_id): -100},
            extra_body={**OFF["extra_body"], "response_format": regex},
        )
    assert client.chat.completions.create(**ASK, **OFF, max_tokens=3).choices


@pytest.mark.parametrize("stream", [True, False])
def test_cancelling(address, client, stream):
    body = ASK | OFF["extra_body"] | {"max_tokens": 1900, "stream": stream}
    body["logit_bias"] = {str(tokenizer().eos_id): -100}
    name = f"mine-{stream}"
    found: list[httpx.Response] = []

    def ask() -> None:
        headers = {"x-request-id": name}
        path = f"{address}/v1/chat/completions"
        found.append(httpx.post(path, json=body, headers=headers, timeout=PATIENCE_S))

    asking = threading.Thread(target=ask)
    asking.start()
    cancel = f"{address}/v1/requests/{name}/cancel"
    while not httpx.post(cancel).json()["cancelled"]:
        assert asking.is_alive()
    asking.join(PATIENCE_S)
    assert not asking.is_alive()
    assert "request_cancelled" in found[0].text


def test_a_client_that_is_killed_in_the_middle_of_a_call(address, engine):
    before = metric(engine, "request_aborts_total")
    text = {"type": "object", "properties": {"t": {"type": "string"}}, "required": ["t"]}
    function = {"name": "say", "strict": True, "parameters": text}
    body = ASK | OFF["extra_body"] | {"max_tokens": 1000, "stream": True, "seed": 1}
    body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    kill_client(address, body, until='{\\"t\\": ')
    while engine.scheduler.has_work:  # far from what it may still say
        threading.Event().wait(0.01)
    assert metric(engine, "request_aborts_total") == before + 1
    with engine._lock:
        assert not engine.scheduler.slots.live and not engine.pages.num_held
        assert engine.scheduler.slots.num_free == SLOTS


def test_one_user_may_not_take_it_all(address, engine, monkeypatch):
    limits = QueueLimits(tenant_requests=1, tenant_slots=1)
    monkeypatch.setattr(engine.scheduler.queue, "limits", limits)
    path, off = f"{address}/v1/chat/completions", OFF["extra_body"]
    long = ASK | off | {"max_tokens": 1900, "user_id": "a"}
    long["logit_bias"] = {str(tokenizer().eos_id): -100}
    asking = []
    for number in range(2):
        headers = {"x-request-id": f"greedy-{number}"}
        more = {"headers": headers, "json": long, "timeout": PATIENCE_S}
        asking.append(threading.Thread(target=httpx.post, args=(path,), kwargs=more))
        asking[-1].start()
        while len(list(engine.scheduler.requests())) <= number:
            assert asking[-1].is_alive()
    refused = httpx.post(path, json=long)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tenant_limit")
    assert int(refused.headers["retry-after"]) > 0
    other = httpx.post(path, json=ASK | off | {"max_tokens": 3, "user_id": "b"}, timeout=PATIENCE_S)
    assert other.status_code == 200
    for number, thread in enumerate(asking):
        httpx.post(f"{address}/v1/requests/greedy-{number}/cancel")
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_messages(address):
    with anthropic.Anthropic(base_url=address, api_key="x") as client:
        asked = {**ASK, "max_tokens": 20}
        with client.messages.stream(**asked, **THINK) as stream:
            message = stream.get_final_message()
    assert message.usage.output_tokens <= 20
    assert message.content[0].type == "thinking"


def test_biases_and_penalties_reach_the_device(client):
    asked = {**ASK, **OFF, "max_tokens": 8, "temperature": 0}
    (index,) = tokenizer().encode_text("Z")
    reply = client.chat.completions.create(**asked, logit_bias={str(index): 100})
    assert reply.choices[0].message.content == "Z" * 8
    reply = client.chat.completions.create(**asked, logit_bias={str(index): 100}, stop="ZZ")
    assert reply.choices[0].message.content == ""
