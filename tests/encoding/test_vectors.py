"""Prompts written out by hand, the published examples, and frozen random conversations."""

import hashlib
import json

import pytest

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding import encode_messages, join_segments, render_segments
from tests.encoding import support
from tests.encoding.support import TOOL, assistant, call, result, system, user

B, U, A, E, R = C.BOS, C.USER, C.ASSISTANT, C.EOS, C.LATEST_REMINDER
TOOLS_TEXT = (
    C.TOOLS_HEAD
    + '{"name": "f", "description": "ä", "parameters": {"type": "object"}}'
    + C.TOOLS_TAIL
)
CALLS = [call("f", "{}", "1"), call("g", '{"a":1.0,"b":"x\\ny","c":[1,"é"]}', "2")]
CALLS_TEXT = (
    "<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="g">\n'
    '<｜DSML｜parameter name="a" string="false">1.0</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="true">x\ny</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="c" string="false">[1, "é"]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)
TURNS = [user("q1"), assistant("a1", "r1"), user("q2")]
REMINDER = {"role": "latest_reminder", "content": "R"}

# Name: messages, options, prompt.
VECTORS = {
    "user": ([user("a")], {}, f"{B}{U}a{A}<think>"),
    "chat ignores effort": (
        [user("a")],
        {"thinking_mode": "chat", "reasoning_effort": "max"},
        f"{B}{U}a{A}</think>",
    ),
    "users merge": ([user("a"), user("b")], {}, f"{B}{U}a\n\nb{A}<think>"),
    "reasoning drops": (TURNS, {}, f"{B}{U}q1{A}</think>a1{E}{U}q2{A}<think>"),
    "tools keep reasoning": (
        [system("S", tools=[TOOL]), *TURNS],
        {},
        f"{B}S\n\n{TOOLS_TEXT}{U}q1{A}<think>r1</think>a1{E}{U}q2{A}<think>",
    ),
    "drop switched off": (
        TURNS,
        {"drop_thinking": False},
        f"{B}{U}q1{A}<think>r1</think>a1{E}{U}q2{A}<think>",
    ),
    "tool results follow the calls": (
        [
            user("q"),
            assistant(tool_calls=CALLS),
            result("2", "R2"),
            result("1", "R1"),
            user("and?"),
        ],
        {},
        f"{B}{U}q{A}</think>\n\n{CALLS_TEXT}{E}{U}<tool_result>R1</tool_result>\n\n"
        f"<tool_result>R2</tool_result>\n\nand?{A}<think>",
    ),
    "reminder": ([REMINDER, user("a")], {}, f"{B}{R}R{U}a{A}<think>"),
    "task query": ([user("q", task="query")], {}, f"{B}{U}q<｜query｜>"),
    "task action": ([user("q", task="action")], {}, f"{B}{U}q{A}<think><｜action｜>"),
    "task title": (
        [user("q"), assistant("a", task="title")],
        {"thinking_mode": "chat"},
        f"{B}{U}q{A}</think>a{E}<｜title｜>",
    ),
    "assistant first": ([assistant("hello"), user("u")], {}, f"{B}hello{E}{U}u{A}<think>"),
    "no BOS": ([user("a")], {"add_default_bos_token": False}, f"{U}a{A}<think>"),
    "context": ([user("q2")], {"context": TURNS[:2]}, f"{U}q2{A}<think>"),
    "effort": (
        [user("a")],
        {"reasoning_effort": "max"},
        f"{B}{C.EFFORT_ABSOLUTE}{U}a{A}<think>",
    ),
    "effort high, official": (
        [user("a")],
        {"reasoning_effort": "high", "profile": "official"},
        f"{B}{C.EFFORT_ABSOLUTE}{U}a{A}<think>",
    ),
    "effort max, official": (
        [user("a")],
        {"reasoning_effort": "max", "profile": "official"},
        f"{B}{C.EFFORT_BEYOND}{U}a{A}<think>",
    ),
    "continued answer": (
        [user("q"), assistant("Well,", wo_eos=True)],
        {},
        f"{B}{U}q{A}<think></think>Well,",
    ),
    "reply schema": (
        [system("S", response_format={"type": "object"}), user("q")],
        {},
        f'{B}S\n\n{C.RESPONSE_FORMAT_HEAD}{{"type": "object"}}{U}q{A}<think>',
    ),
    "list results": (
        [result("1", [{"type": "text", "text": "a"}, {"type": "image"}])],
        {},
        f"{B}{U}<tool_result>a\n\n[Unsupported image]</tool_result>{A}<think>",
    ),
    "nothing": ([], {}, f"{B}"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_prompt_as_string(name):
    messages, options, expected = VECTORS[name]
    assert encode_messages(messages, **options) == expected


@pytest.mark.parametrize("name", VECTORS)
def test_prompt_as_segments(name):
    messages, options, expected = VECTORS[name]
    segments = render_segments(messages, **options)
    assert join_segments(segments) == expected
    for before, after in zip(segments, segments[1:], strict=False):
        assert before.is_control or after.is_control, "neighbouring text must be merged"
    for segment in segments:
        assert segment.text
        assert segment.is_control == (segment.text in C.CONTROL_TOKENS)


@pytest.mark.parametrize("name", VECTORS)
def test_prompt_as_tokens(name, tokenizer):
    """None of these texts contains a control string, so both ways of tokenising agree."""
    messages, options, _ = VECTORS[name]
    ids = tokenizer.encode_segments(render_segments(messages, **options))
    prompt = encode_messages(messages, **options)
    assert ids == tokenizer.encode_text(prompt, "control")
    assert tokenizer.decode(ids) == prompt


@pytest.mark.parametrize(
    "number, digest",
    [(1, "9b366d9d2eac842a"), (2, "ca66b01a1ac3a204"), (3, "b3b1cd8748b7b90d")]
    + [(4, "60e1643840ba9e4a")],
)
def test_published_example(number, digest):
    messages, mode, prompt = support.example(number)
    assert hashlib.sha256(prompt.encode()).hexdigest().startswith(digest)
    assert encode_messages(messages, thinking_mode=mode) == prompt
    assert join_segments(render_segments(messages, thinking_mode=mode)) == prompt


@pytest.mark.parametrize("number, tokens", [(1, 541), (2, 53), (3, 820), (4, 582)])
def test_published_example_in_tokens(number, tokens, official):
    messages, mode, prompt = support.example(number)
    ids = official.encode_segments(render_segments(messages, thinking_mode=mode))
    assert len(ids) == tokens
    assert ids == official.encode_text(prompt, "control")
    assert official.decode(ids) == prompt


def test_random_conversations():
    cases = json.loads((support.DATA / "random_conversations.json").read_text(encoding="utf-8"))
    wrong = []
    for index, case in enumerate(cases):
        before = json.dumps(case)
        prompt = encode_messages(case["messages"], **case["options"])
        if hashlib.sha256(prompt.encode()).hexdigest() != case["sha256"]:
            wrong.append(index)
        assert json.dumps(case) == before, "the input must not be modified"
    assert not wrong, f"{len(wrong)} of {len(cases)} prompts differ from the published encoder"
