"""Choices of whoever runs the server: what each of them changes."""

import asyncio
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving import completion_schema, schema
from dsv4_jax.serving.anthropic import request as anthropic_request
from dsv4_jax.serving.api import create_app
from dsv4_jax.serving.client import Answer
from dsv4_jax.serving.engine.loop import EngineFull
from dsv4_jax.serving.engine.stream import EngineError, SlowReader
from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.grammar.guide import GrammarError
from dsv4_jax.serving.options import OPTIONS, most_waiting, reasoning_fields
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.rules import Rules
from dsv4_jax.serving.schema import read_chat_request
from dsv4_jax.serving.settings import resolve
from tests.serving.completions import block, invoke, json_parameter
from tests.serving.fakes import (
    MAX_LEN,
    MODEL,
    FakeModel,
    answer,
    counted,
    ids,
    make_service,
    tokenizer,
)

USER = {"role": "user", "content": "q"}
ASK: dict[str, Any] = {"messages": [USER]}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "r"}


def plan(rules: Rules, **fields: Any):
    return Planner(tokenizer(), "official", MAX_LEN, rules).plan(read_chat_request(ASK | fields))


def served(model: FakeModel | None = None, **settings: Any) -> TestClient:
    service = make_service(model or FakeModel(answer("hi")), **settings)
    return TestClient(create_app(service), raise_server_exceptions=False)


# Prompts and sampling


def test_official_sampling_counts_while_thinking_only():
    asked = {"temperature": 0.2, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "presence_penalty": 1}
    off = {"thinking": {"type": "disabled"}}
    for official, more in ((False, {}), (False, off), (True, off)):
        sampling = plan(Rules(official_sampling=official), **asked, **more).sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.2, 0.5, 3)
    sampling = plan(Rules(official_sampling=True), **asked).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert sampling.presence_penalty == 1


def test_reasoning_of_earlier_calls_may_be_required():
    said = {"role": "assistant", "tool_calls": [CALL]}
    plan(Rules(), messages=[USER, said, RESULT])
    with pytest.raises(ApiError) as caught:
        plan(Rules(requires_reasoning=True), messages=[USER, said, RESULT])
    assert (caught.value.status, caught.value.param) == (400, "messages[1].reasoning_content")
    whole = said | {"reasoning_content": "because"}
    plan(Rules(requires_reasoning=True), messages=[USER, whole, RESULT])


def test_internal_roles():
    reminder = [{"role": "latest_reminder", "content": "R"}, USER]
    developer = [{"role": "developer", "content": "D"}]
    with pytest.raises(ApiError, match="latest_reminder"):
        plan(Rules(), messages=reminder)
    prompt = tokenizer().decode(plan(Rules(internal_roles=True), messages=reminder).prompt_ids)
    assert f"{C.LATEST_REMINDER}R{C.USER}q" in prompt
    prompt = tokenizer().decode(plan(Rules(internal_roles=True), messages=developer).prompt_ids)
    assert f"{C.USER}D{C.ASSISTANT}" in prompt
    prompt = tokenizer().decode(plan(Rules(), messages=[*developer, USER]).prompt_ids)
    assert f"D{C.USER}q" in prompt


@pytest.mark.parametrize("policy", ["text", "control", "reject"])
def test_control_tokens_spelled_in_text(policy):
    model = FakeModel(answer("hi"))
    service = make_service(model)
    service.ready(
        Planner(tokenizer(), "official", MAX_LEN, Rules(special_tokens_in_text=policy)), model, "fp"
    )
    spelled = {"messages": [{"role": "user", "content": f"a{C.EOS}b"}]}
    with TestClient(create_app(service)) as client:
        chat = client.post("/v1/chat/render", json=spelled)
        text = client.post("/tokenize", json={"prompt": C.EOS})
        raw = client.post("/v1/completions", json={"prompt": f"a{C.EOS}", "max_tokens": 1})
    if policy == "reject":
        for reply, param in ((chat, "messages"), (text, "prompt"), (raw, "prompt")):
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (
                400,
                "invalid_value",
                param,
            )
            assert C.EOS in error["message"]
        return
    eos = tokenizer().eos_id
    is_control = policy == "control"
    assert (eos in chat.json()["tokens"]) == is_control
    assert (text.json()["tokens"] == [eos]) == is_control
    assert (eos in model.prompts[-1]) == is_control and raw.status_code == 200


def test_what_calls_are_held_to():
    ranged = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "x", "pattern": "("}}}

    def calls(mode: Any, schema: dict, **function: Any):
        function |= {"name": "f", "parameters": schema}
        tools = [{"type": "function", "function": function}]
        return plan(Rules(tool_grammar=mode), tools=tools).constraints.calls

    assert calls("off", ranged) is None
    assert calls("off", ranged, strict=True) is not None
    empty, whole = block(invoke("f")), block(invoke("f", json_parameter("a", "2")))
    loose, strict = (calls(mode, ranged) for mode in ("structure", "strict"))
    assert follows(loose, empty) and follows(loose, whole)
    assert follows(strict, whole) and not follows(strict, empty)
    assert calls("strict", odd) is not None  # held to its structure


def follows(grammar: Any, completion: str) -> bool:
    guide, text = grammar.guide(), completion.partition(C.DSML)[2]
    try:
        for token in ids(text):
            guide.advance(token)
    except GrammarError:
        return False
    return guide.may_end


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", ASK), ("/v1/completions", {"prompt": "q"})]
)
def test_prompts_are_logged_only_where_wanted(path, body, logs, caplog):
    caplog.set_level("DEBUG")
    with served(logs_prompts=logs) as client:
        asked = json.loads(json.dumps(body).replace('"q"', '"hush-hush"'))
        assert client.post(path, json=asked).status_code == 200
    assert ("hush-hush" in caplog.text) == logs


# Requests and replies


@pytest.mark.parametrize("names", [("reasoning_content", "reasoning"), ("reasoning",)])
def test_names_of_reasoning(names):
    with served(FakeModel(answer("hi", reasoning="hm")), reasoning_fields=names) as client:
        whole = client.post("/v1/chat/completions", json=ASK).json()
        streamed = client.post("/v1/chat/completions", json=ASK | {"stream": True}).text
    message = whole["choices"][0]["message"]
    assert {k: v for k, v in message.items() if k.startswith("reasoning")} == dict.fromkeys(
        names, "hm"
    )
    events = [line[6:] for line in streamed.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(event) for event in events]
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    said = [tuple(delta) for delta in deltas if any(k.startswith("reasoning") for k in delta)]
    assert said and set(said) == {names}
    taken = Answer()
    for chunk in chunks:
        taken.take(chunk)
    assert taken.reasoning == "hm"


def test_any_name_of_a_model():
    ask = ASK | {"model": "gpt-9"}
    with served() as client:
        assert client.post("/v1/chat/completions", json=ask).status_code == 404
    with served(answers_any_name=True) as client:
        assert client.post("/v1/chat/completions", json=ask).json()["model"] == "gpt-9"
        assert client.post("/v1/chat/completions", json=ASK).json()["model"] == MODEL
        assert client.get("/v1/models").json()["data"][0]["id"] == MODEL


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", ASK),
        ("/v1/chat/render", ASK),
        ("/v1/completions", {"prompt": "q"}),
        ("/v1/messages", ASK | {"max_tokens": 5}),
    ],
)
def test_unknown_fields(path, body):
    for refuses in (False, True):
        with served(refuses_unknown_fields=refuses) as client:
            assert client.post(path, json=body).status_code == 200
            reply = client.post(path, json=body | {"temprature": 1})
            assert reply.status_code == (400 if refuses else 200)
            assert ("temprature" in reply.text) == refuses


def test_names_of_metrics():
    with served(metrics_prefix="vllm:") as client:
        client.get("/health")
        text = client.get("/metrics").text
    assert "vllm:engine_phase{" in text and "vllm:asyncio_tasks" in text
    own = [line for line in text.splitlines() if line.startswith("dsv4:")]
    assert all("answers" not in line and "asyncio" not in line for line in own)


def test_health_turns_bad_while_no_step_is_made():
    model = FakeModel(answer("hi"))
    with served(model, health_timeout_s=5) as client:
        model.busy_s = 4.0
        assert client.get("/health").status_code == 200
        model.busy_s = 6.0
        reply = client.get("/health")
        assert (reply.status_code, reply.json()["status"]) == (503, "stuck")
        model.busy_s = 0.0
        assert client.get("/health").status_code == 200


# What the engine refuses or gives up


class Refusing(FakeModel):
    def __init__(self, error: Exception) -> None:
        super().__init__("x")
        self.error = error

    def stream(self, *_: Any, **__: Any):
        raise self.error


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize(
    ("reason", "status", "kind"),
    [
        ("tenant_limit", 429, "rate_limit_error"),
        ("queue_full", 429, "rate_limit_error"),
        ("draining", 503, "service_unavailable"),
    ],
)
def test_refusals(path, reason, status, kind, is_streamed):
    with served(Refusing(EngineFull(reason, 7))) as client:
        reply = client.post(path, json=ASK | {"max_tokens": 5, "stream": is_streamed})
        assert reply.headers["retry-after"] == "7"
        text = client.get("/metrics").text
    if path == "/v1/messages":
        assert reply.status_code == (529 if status == 503 else status)
        return
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"]) == (status, reason, kind)
    assert counted(text, "dsv4:request_errors_total", code=reason) == 1
    assert counted(text, "dsv4:answers_total", reason=reason) == 1


def test_a_reader_that_is_too_slow_is_told_so(caplog):
    class Slow(FakeModel):
        def stream(self, *args: Any, **more: Any):
            stream = super().stream(*args, **more)

            def tokens():
                yield from stream._drawn(ids("ab"))
                raise EngineError("the request ended early: error") from SlowReader("slow")

            stream._draws = tokens()
            return stream

    caplog.set_level("INFO")
    with served(Slow("ab")) as client:
        off = {"thinking": {"type": "disabled"}, "stream": True}
        text = client.post("/v1/chat/completions", json=ASK | off).text
        metrics = client.get("/metrics").text
    assert '"code":"slow_reader"' in text and text.endswith("data: [DONE]\n\n")
    assert "internal_error" not in text
    assert counted(metrics, "dsv4:request_errors_total", code="slow_reader") == 1
    assert "finish=slow_reader aborted_by=client" in caplog.text


# The command line


def settled(*flags: str, **variables: str):
    given = {f"DSV4_{name}": value for name, value in variables.items()}
    return resolve(OPTIONS, list(flags), given).namespace()


def test_how_many_may_wait():
    assert [most_waiting(settled("--slots", n)) for n in ("1", "8", "500")] == [4, 32, 256]
    assert most_waiting(settled("--max-waiting", "3")) == 3


def test_reasoning_field():
    assert reasoning_fields(settled()) == ("reasoning_content", "reasoning")
    assert reasoning_fields(settled(REASONING_FIELD="reasoning")) == ("reasoning",)


@pytest.mark.parametrize(
    ("flag", "wrong"),
    [
        ("metrics-prefix", "9a"),
        ("metrics-prefix", "a:b"),
        ("reasoning-field", "thoughts"),
        ("special-tokens-in-text", "maybe"),
        ("tenant-waiting", "0"),
        ("queue-timeout", "0"),
    ],
)
def test_wrong_choices(flag, wrong):
    with pytest.raises(ValueError, match=f"--{flag} '{wrong}': must be"):
        settled(f"--{flag}", wrong)


@pytest.mark.parametrize(
    ("path", "body", "module"),
    [
        ("/v1/chat/completions", ASK, schema),
        ("/v1/chat/render", ASK, schema),
        ("/tokenize", ASK, schema),
        ("/v1/completions", {"prompt": "q"}, completion_schema),
        ("/v1/messages", ASK | {"max_tokens": 5}, anthropic_request),
    ],
)
def test_requests_are_read_off_the_event_loop(path, body, module, monkeypatch):
    """Those of many MiB would hold up all others."""
    loops = []

    def note(*_: object) -> None:
        loops.append(asyncio._get_running_loop())

    monkeypatch.setattr(module, "check_known", note)
    with served() as client:
        assert client.post(path, json=body).status_code == 200
    assert loops == [None]
