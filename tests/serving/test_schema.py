"""Which requests are understood, refused, or wrong."""

import pytest

from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.schema import ChatRequest, read_chat_request

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
    {"presence_penalty": 0.0, "frequency_penalty": 0},
    {"repetition_penalty": 1.0},
    {"logit_bias": {}},
    {"response_format": {"type": "text"}},
    {"parallel_tool_calls": True},
    {"modalities": ["text"]},
    {"tools": [], "tool_choice": "auto"},
    {"top_k": -1},
    {"user": "me", "user_id": "x" * 512, "metadata": {"a": "b"}, "priority": 3},
    {"something_new": [1, 2]},
    {"stream_options": {"continuous_usage_stats": False}},
]


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_values_that_ask_for_nothing_are_accepted(fields):
    assert read(**fields) == ChatRequest(messages=MESSAGES)


UNSUPPORTED = [
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"min_p": 0.1}, "min_p"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -0.5}, "frequency_penalty"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"logit_bias": {"1": 100}}, "logit_bias"),
    ({"logit_bias": {str(i): 1e9 for i in range(5000)}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tool_choice": "required", "tools": [NEW]}, "tool_choice"),
    ({"tool_choice": NEW, "tools": [NEW]}, "tool_choice"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"stop_token_ids": [1]}, "stop_token_ids"),
    ({"ignore_eos": True}, "ignore_eos"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"task": "title"}, "task"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        "tools[0].function.strict",
    ),
    ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
]


@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED, ids=str)
def test_what_we_cannot_do_is_refused_by_name(fields, param):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "unsupported_value", param)
    assert error.message.startswith(param)


WRONG = [
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


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_the_body_must_be_an_object(body):
    with pytest.raises(ApiError, match="JSON object"):
        read_chat_request(body)


def test_messages_are_required():
    with pytest.raises(ApiError) as caught:
        read_chat_request({})
    assert caught.value.param == "messages"
