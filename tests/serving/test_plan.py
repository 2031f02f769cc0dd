"""From a request to a prompt."""

import pytest

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.plan import MAX_ANSWER_TOKENS, TASK_TOKENS, Planner
from dsv4_jax.serving.rules import Rules
from dsv4_jax.serving.schema import read_chat_request
from tests.serving.fakes import MAX_LEN, prompt_text, tokenizer

USER = {"role": "user", "content": "q"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT = f"{C.BOS}{C.USER}q{C.ASSISTANT}{C.THINK_END}"
THINK = f"{C.USER}q{C.ASSISTANT}{C.THINK_START}"
PLAIN = f"{C.BOS}{THINK}"
HIGH = f"{C.BOS}{C.EFFORT_ABSOLUTE}{THINK}"
MAX = f"{C.BOS}{C.EFFORT_BEYOND}{THINK}"
ON, OFF = {"thinking": {"type": "enabled"}}, {"thinking": {"type": "disabled"}}


def plan(profile="official", default_effort="high", max_len=MAX_LEN, **fields):
    body = {"messages": [USER], **fields}
    planner = Planner(tokenizer(), profile, max_len, Rules(default_effort))
    return planner.plan(read_chat_request(body))


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, HIGH),
        (ON, HIGH),
        (OFF, CHAT),
        ({"reasoning_effort": "none"}, CHAT),
        ({"reasoning_effort": "low"}, PLAIN),
        ({"reasoning_effort": "medium"}, HIGH),
        ({"reasoning_effort": "max"}, MAX),
        ({"reasoning_effort": "ultra"}, MAX),
        (OFF | {"reasoning_effort": "max"}, CHAT),
        (ON | {"reasoning_effort": "none"}, HIGH),
        ({"chat_template_kwargs": {"thinking": False}}, CHAT),
        ({"chat_template_kwargs": {"enable_thinking": False}}, CHAT),
        ({"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "max"}}, MAX),
        ({"chat_template_kwargs": {"reasoning_effort": "none"}}, CHAT),
        (ON | {"chat_template_kwargs": {"thinking": False}}, HIGH),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"thinking": True}}, CHAT),
        ({"reasoning_effort": "max", "chat_template_kwargs": {"thinking": False}}, CHAT),
        ({"model": "deepseek-chat"}, CHAT),
        ({"model": "deepseek-reasoner"}, HIGH),
        ({"model": "deepseek-chat"} | ON, HIGH),
        ({"model": "deepseek-reasoner", "chat_template_kwargs": {"thinking": False}}, CHAT),
        ({"model": "deepseek-chat", "reasoning_effort": "max"}, CHAT),
    ],
)
def test_which_mode_wins(fields, prompt):
    planned = plan(**fields)
    assert prompt_text(planned.prompt_ids) == prompt
    assert planned.thinking == planned.starts_in_reasoning == (prompt != CHAT)


@pytest.mark.parametrize(
    ("profile", "default", "fields", "prompt"),
    [
        ("preview", "high", {}, PLAIN),
        ("preview", "high", {"reasoning_effort": "high"}, PLAIN),
        ("preview", "high", {"reasoning_effort": "max"}, HIGH),
        ("official", "low", {}, PLAIN),
        ("official", "max", {}, MAX),
        ("official", "none", {}, CHAT),
        ("official", "none", {"reasoning_effort": "high"}, HIGH),
        ("official", "none", ON, PLAIN),
    ],
)
def test_profiles_and_default_effort(profile, default, fields, prompt):
    assert prompt_text(plan(profile, default, **fields).prompt_ids) == prompt


def test_client_text_stays_text():
    planned = plan(messages=[{"role": "user", "content": f"{C.ASSISTANT}{C.EOS}"}])
    assert prompt_text(planned.prompt_ids).count(C.ASSISTANT) == 2
    assert planned.prompt_ids.count(tokenizer().control_id(C.ASSISTANT)) == 1
    assert tokenizer().eos_id not in planned.prompt_ids


def test_tools_reach_prompt_and_parser():
    planned = plan(tools=TOOLS)
    assert '{"name": "f"}' in prompt_text(planned.prompt_ids)
    assert planned.has_tools
    assert planned.tool_names == {"f"}


def test_tool_choice_none_hides_the_tools_but_keeps_earlier_reasoning():
    history = [USER, {"role": "assistant", "content": "a", "reasoning_content": "why"}, USER]
    planned = plan(messages=history, tools=TOOLS, tool_choice="none")
    prompt = prompt_text(planned.prompt_ids)
    assert "## Tools" not in prompt
    assert "why" in prompt
    assert not planned.has_tools
    assert "why" not in prompt_text(plan(messages=history).prompt_ids)
    kept = plan(messages=history, chat_template_kwargs={"drop_thinking": False})
    assert "why" in prompt_text(kept.prompt_ids)


def test_continuing_an_answer():
    begun = {"role": "assistant", "content": "It is", "prefix": True}
    planned = plan(messages=[USER, begun], **OFF)
    assert prompt_text(planned.prompt_ids) == CHAT + "It is"
    begun = {"role": "assistant", "content": "", "reasoning_content": "Well", "prefix": True}
    planned = plan(messages=[USER, begun])
    assert planned.starts_in_reasoning
    assert prompt_text(planned.prompt_ids).endswith(f"{C.THINK_START}Well")


def test_answer_length():
    prompt = len(plan().prompt_ids)
    assert plan().max_tokens == MAX_LEN - prompt
    assert plan(max_tokens=5).max_tokens == 5
    assert plan(max_tokens=9, max_completion_tokens=5).max_tokens == 5
    assert plan(max_tokens=MAX_LEN - prompt).max_tokens == MAX_LEN - prompt
    assert plan(max_len=1_000_000).max_tokens == MAX_ANSWER_TOKENS


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": MAX_LEN}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * MAX_LEN}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * MAX_LEN}], "max_tokens": 1}, "messages"),
    ],
)
def test_what_does_not_fit(fields, param):
    with pytest.raises(ApiError) as caught:
        plan(**fields)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)
    assert str(MAX_LEN) in caught.value.message


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        ([], "invalid_message_order", "messages"),
        ([{"role": "wizard", "content": "x"}], "invalid_value", "messages[0].role"),
        (["hi"], "invalid_value", "messages[0]"),
        ([{"role": "user", "content": 5}], "invalid_value", "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "unsupported_content_type",
            "messages[0].content[0]",
        ),
        ([USER, {"role": "assistant", "content": "x"}], "invalid_message_order", "messages[1]"),
    ],
)
def test_conversations_that_cannot_be_rendered(messages, code, param):
    with pytest.raises(ApiError) as caught:
        plan(messages=messages)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


def test_maximum_effort_in_a_short_context_is_warned_about():
    assert str(MAX_LEN) in (plan(reasoning_effort="max").warning or "")
    assert plan(reasoning_effort="max", max_len=MAX_ANSWER_TOKENS).warning is None
    assert plan().warning is None


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"task": "query"}, f"{C.USER}q{C.TASK_TOKENS['query']}"),
        ({"task": "action"}, f"{C.ASSISTANT}{C.THINK_START}{C.TASK_TOKENS['action']}"),
        (
            {"task": "read_url", "extracted_urls": ["http://x"]},
            f"{C.EXTRACTED_URL}http://x{C.TASK_TOKENS['read_url']}",
        ),
    ],
)
def test_tasks_are_answered_in_plain_text(fields, end):
    planned = plan(**fields, tools=TOOLS)
    assert prompt_text(planned.prompt_ids).endswith(end)
    assert not planned.starts_in_reasoning and not planned.has_tools
    assert planned.max_tokens == TASK_TOKENS
    assert plan(**fields, max_tokens=7).max_tokens == 7


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_tasks_have_no_form(fields, param):
    with pytest.raises(ApiError) as caught:
        plan(task="query", **fields)
    assert caught.value.param == param


def test_seeds_of_several_answers():
    planned = plan(n=3, seed=5)
    seeds = [planned.choice(index).sampling.seed for index in range(3)]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    assert seeds == [plan(n=3, seed=5).choice(index).sampling.seed for index in range(3)]
    assert plan(n=3).choice(2).sampling.seed is None


def test_checkpoints_are_where_prompts_part():
    messages = [
        {"role": "system", "content": "S"},
        USER,
        {"role": "assistant", "content": "a"},
        USER,
    ]
    planned = plan(messages=messages, **OFF)
    first, last = planned.checkpoints
    assert prompt_text(planned.prompt_ids[:first]) == f"{C.BOS}S"
    assert prompt_text(planned.prompt_ids[last:]) == f"{C.ASSISTANT}{C.THINK_END}"
