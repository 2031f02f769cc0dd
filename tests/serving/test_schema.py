"""Which requests are understood, refused, or wrong."""

import pytest

from dsv4_jax import sampling
from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.sampling_fields import MAX_BIASED, MAX_LOGPROBS
from dsv4_jax.serving.schema import ChatRequest, read_chat_request
from dsv4_jax.serving.tool_fields import ReplyFormat, ToolChoice

MESSAGES = [{"role": "user", "content": "q"}]
NEW = {"type": "function", "function": {"name": "f"}}


def read(**fields) -> ChatRequest:
    return read_chat_request({"messages": MESSAGES, **fields})


def test_defaults():
    assert read() == ChatRequest(messages=MESSAGES)
    nulls = ("model", "max_tokens", "stop", "tools", "tool_choice", "n", "thinking", "seed")
    assert read(**dict.fromkeys(nulls)) == ChatRequest(messages=MESSAGES)


HARMLESS = [
    {"n": 1},
    {"logprobs": False},
    {"top_logprobs": 0},
    {"best_of": 1, "stop_token_ids": [], "stop_in_reasoning": False},
    {"logit_bias": {}},
    {"response_format": {"type": "text"}},
    {"parallel_tool_calls": True},
    {"modalities": ["text"]},
    {"tools": [], "tool_choice": "auto"},
    {"metadata": {"a": "b"}, "priority": 0, "store": False},
    {"min_tokens": 0, "ignore_eos": False},
    {"something_new": [1, 2]},
    {"stream_options": {"continuous_usage_stats": False}},
]


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_values_that_ask_for_nothing_are_accepted(fields):
    assert read(**fields) == ChatRequest(messages=MESSAGES)


UNSUPPORTED = [
    ({"best_of": 2}, "best_of"),
    ({"tool_choice": {"type": "allowed_tools"}, "tools": [NEW]}, "tool_choice.type"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"functions": [{"name": "f"}]}, "functions"),
]


@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED, ids=str)
def test_what_we_cannot_do_is_refused_by_name(fields, param):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "unsupported_value", param)
    assert error.message.startswith(param)


WRONG = [
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"min_p": 1.1}, "min_p"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"response_format": {}}, "response_format.type"),
    ({"task": "sing"}, "task"),
    ({"task": "read_url", "extracted_urls": [5]}, "extracted_urls"),
    ({"task": "read_url", "extracted_urls": ["a"] * 9, "n": 2}, "extracted_urls"),
    ({"extracted_urls": ["a"]}, "extracted_urls"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "regex"}}, "response_format.regex"),
    ({"response_format": {"type": "grammar", "grammar": ""}}, "response_format.grammar"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"tools": [{"function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
    ({"messages": "hi"}, "messages"),
    ({"model": 5}, "model"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.0}, "max_tokens"),
    ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stop": ""}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", None]}, "stop"),
    ({"stop": ["x" * 1001]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"thinking": "on"}, "thinking"),
    ({"thinking": {}}, "thinking.type"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs.thinking"),
    ({"tools": {}}, "tools"),
    ({"tools": [NEW] * 129}, "tools"),
    ({"tools": ["f"]}, "tools[0]"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": 5}, "tool_choice"),
    ({"user_id": "é" * 257}, "user_id"),
    ({"metadata": "x"}, "metadata"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values_are_refused_by_name(fields, param):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_value", param)
    assert len(error.message) < 300


def test_what_is_understood():
    asked = read(
        **{"n": 3, "logprobs": True, "top_logprobs": 2, "min_p": 0.1, "presence_penalty": -2},
        **{"frequency_penalty": 2, "repetition_penalty": 1.5, "logit_bias": {"7": -100, "8": 3}},
        **{"top_k": -1, "seed": -3, "user": "me", "stop_token_ids": [5], "best_of": 3},
        **{"parallel_tool_calls": False, "include_stop_str_in_output": True},
    )
    assert (asked.n, asked.logprobs, asked.user, asked.stop_ids) == (3, 2, "me", {5})
    assert (asked.parallel_calls, asked.keep_stop) == (False, True)
    assert asked.sampling == {
        **{"min_p": 0.1, "presence_penalty": -2, "frequency_penalty": 2, "top_k": 0, "seed": -3},
        **{"repetition_penalty": 1.5, "logit_bias": ((7, -100.0), (8, 3.0))},
    }
    assert read(logprobs=True).logprobs == 0
    assert (
        len(read(logit_bias=dict.fromkeys(map(str, range(1024)), 1)).sampling["logit_bias"]) == 1024
    )
    assert read(user="a", user_id="b").user == "b"


def test_limits_agree_with_the_sampler():
    assert (MAX_BIASED, MAX_LOGPROBS) == (sampling.MAX_BIASED, sampling.MAX_LOGPROBS)


def test_choices_and_formats():
    assert read(tool_choice="required").tool_choice == ToolChoice("required")
    assert read(tool_choice="none").tool_choice == ToolChoice("none")
    assert read(tool_choice=NEW).tool_choice == ToolChoice("required", "f")
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}
    assert read(response_format=schema).reply_format == ReplyFormat(
        "json_schema", {"type": "array"}
    )
    json_object = ReplyFormat("json_object", {"type": "object"})
    assert read(response_format={"type": "json_object"}).reply_format == json_object


def test_a_schema_is_required():
    with pytest.raises(ApiError) as caught:
        read(response_format={"type": "json_schema", "json_schema": {}})
    error = caught.value
    assert (error.code, error.param) == (
        "invalid_schema",
        "response_format.json_schema.schema",
    )


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_the_body_must_be_an_object(body):
    with pytest.raises(ApiError, match="JSON object"):
        read_chat_request(body)


def test_messages_are_required():
    with pytest.raises(ApiError) as caught:
        read_chat_request({})
    assert caught.value.param == "messages"
