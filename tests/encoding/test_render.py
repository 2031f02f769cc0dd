"""Rules of the prompt that the vectors do not show, and errors."""

import pytest

from dsv4_jax.encoding import (
    EncodingError,
    Segment,
    encode_messages,
    join_segments,
    render_fim,
    render_raw,
    render_segments,
    starts_in_reasoning,
)
from dsv4_jax.encoding import constants as C
from tests.encoding.support import TOOL, assistant, call, result, system, user


def test_names_and_arguments_are_the_published_ones():
    positional = encode_messages([user("b")], "chat", [user("a")], False, False, "max")
    by_name = encode_messages(
        messages=[user("b")],
        thinking_mode="chat",
        context=[user("a")],
        drop_thinking=False,
        add_default_bos_token=False,
        reasoning_effort="max",
    )
    assert positional == by_name == f"{C.USER}b{C.ASSISTANT}{C.THINK_END}"


def test_developer_messages_before_the_last_user_vanish():
    messages = [{"role": "developer", "content": "D"}, assistant("a", "r"), user("q")]
    assert "D" not in encode_messages(messages)
    assert "D" in encode_messages(messages, drop_thinking=False)
    assert "D" in encode_messages(messages, thinking_mode="chat")


def test_a_text_does_not_join_a_turn_with_a_task():
    prompt = encode_messages([user("a", task="query"), user("b")])
    assert prompt == f"{C.BOS}{C.USER}a{C.USER}b{C.ASSISTANT}<think>"


def test_the_answer_to_a_task_has_no_reasoning():
    prompt = encode_messages([user("q", task="action"), assistant("Search", "r")])
    assert prompt.endswith("<think><｜action｜>Search" + C.EOS)


@pytest.mark.parametrize("arguments", ["not json", '{"a":', {"a": 1}, None])
def test_arguments_that_are_not_json_text_become_one_parameter(arguments):
    prompt = encode_messages([user("q"), assistant(tool_calls=[call("f", arguments)])])
    assert prompt.count('parameter name="arguments"') == 1


def test_unknown_result_ids_sort_with_the_first_call():
    calls = [call("f", "{}", "1"), call("g", "{}", "2")]
    turns = [user("q"), assistant(tool_calls=calls), result("2", "R2"), result("?", "R?")]
    prompt = encode_messages(turns)
    assert prompt.index("R?") < prompt.index("R2")


def test_user_text_stays_text_in_segments():
    text = f"{C.USER}<think>{C.DSML}{C.EOS}"
    segments = render_segments([system(text), user(text), assistant(text, text), user(text)])
    assert Segment(text, False) in segments
    assert [s.text for s in segments if s.is_control] == [
        *(C.BOS, C.USER, C.ASSISTANT, C.THINK_END, C.EOS),
        *(C.USER, C.ASSISTANT, C.THINK_START),
    ]


@pytest.mark.parametrize(
    "messages, mode, expected",
    [
        ([user("q")], "thinking", True),
        ([user("q")], "chat", False),
        ([user("<think>")], "chat", False),
        ([user("q", task="action")], "thinking", False),
        ([user("q"), assistant("a", wo_eos=True)], "thinking", False),
        ([user("q"), assistant("", "r", open_reasoning=True, wo_eos=True)], "thinking", True),
    ],
)
def test_where_a_completion_starts(messages, mode, expected):
    assert starts_in_reasoning(render_segments(messages, mode)) is expected


def test_fill_in_the_middle():
    prompt = join_segments(render_fim("def f(", "return x"))
    assert prompt == f"{C.BOS}{C.FIM_BEGIN}def f({C.FIM_HOLE}return x{C.FIM_END}"


def test_raw_prompt():
    assert render_raw("<think>") == [Segment(C.BOS, True), Segment("<think>", False)]
    assert render_raw("a", add_bos=False) == [Segment("a", False)]


ERRORS = {
    "mode": ([user("a")], {"thinking_mode": "deep"}, "thinking_mode: 'deep' must be"),
    "effort": ([user("a")], {"reasoning_effort": "low"}, "reasoning_effort: 'low' is not one of"),
    "profile": ([user("a")], {"profile": "0731"}, "profile: '0731' must be"),
    "message": (["hi"], {}, r"messages\[0\]: must be an object, not str"),
    "role": ([user("a"), {"role": "bot"}], {}, r"messages\[1\].role: unknown role 'bot'"),
    "no role": ([{}], {}, r"messages\[0\].role: unknown role None"),
    "user content": ([user(None)], {}, r"messages\[0\].content: must be text, not NoneType"),
    "context": ([user("a")], {"context": [user([])]}, r"context\[0\].content: must be text"),
    "developer": ([{"role": "developer"}], {}, r"messages\[0\].content: a developer message needs"),
    "task": ([user("a", task="poem")], {}, r"messages\[0\].task: 'poem' is not one of action, "),
    "tool": ([system("", tools=[{}])], {}, r"messages\[0\].tools\[0\]: needs a `function`"),
    "tool json": (
        [system("", tools=[{"function": {1j}}])],
        {},
        r"messages\[0\].tools\[0\].function: cannot be written as JSON",
    ),
    "call": (
        [assistant(tool_calls=[{}])],
        {},
        r"messages\[0\].tool_calls\[0\]: needs a `function`",
    ),
    "call name": (
        [assistant(tool_calls=[{"function": {"arguments": "{}"}}])],
        {},
        r"messages\[0\].tool_calls\[0\].function.name: is missing",
    ),
    "arguments": (
        [assistant(tool_calls=[call("f", "[1]")])],
        {},
        r"tool_calls\[0\].function.arguments: must hold a JSON object, not .* list",
    ),
    "call id": ([result([], "x")], {}, r"messages\[0\].tool_call_id: must be a string"),
    "part": ([result("1", ["x"])], {}, r"messages\[0\].content\[0\]: must be an object"),
    "part text": (
        [result("1", [{"type": "text", "text": 1}])],
        {},
        r"messages\[0\].content\[0\].text: must be text, not int",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_field(name):
    messages, options, pattern = ERRORS[name]
    with pytest.raises(EncodingError, match=pattern) as caught:
        encode_messages(messages, **options)
    assert isinstance(caught.value, ValueError)


def test_error_indices_count_the_callers_messages():
    messages = [user("a"), user("b"), result("1", "r"), system("", tools=[TOOL, {}])]
    with pytest.raises(EncodingError, match=r"messages\[3\].tools\[1\]"):
        encode_messages(messages)
