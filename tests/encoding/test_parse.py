"""The strict parser: the grammar, every way to break it, and the way back from the encoder."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_jax.encoding import (
    CompletionError,
    EncodingError,
    encode_messages,
    parse_message_from_completion_text,
)
from dsv4_jax.encoding import constants as C
from tests.encoding.support import PROPERTY, TOOL, assistant, call, system, user

OPEN, CLOSE = "\n\n<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"
END = "</｜DSML｜invoke>\n"


def invoke(*parameters: str, name: str = "f") -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + "".join(p + "\n" for p in parameters) + END


def parameter(key: str, value: str, flag: str = "true") -> str:
    return f'<｜DSML｜parameter name="{key}" string="{flag}">{value}</｜DSML｜parameter>'


def block(*calls: str) -> str:
    return OPEN + "".join(calls) + CLOSE


def test_reasoning_content_and_calls():
    text = "why</think>ok" + block(
        invoke(parameter("a", "x\n<y"), parameter("b", "[1, 2]", "false")),
        '<｜DSML｜invoke name="g">\n\n' + END,
    )
    assert parse_message_from_completion_text(text + C.EOS, "thinking") == {
        "role": "assistant",
        "content": "ok",
        "reasoning_content": "why",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "f", "arguments": '{"a": "x\\n<y", "b": [1, 2]}'},
            },
            {"type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_chat_mode():
    message = parse_message_from_completion_text("hi" + C.EOS, thinking_mode="chat")
    assert message == assistant("hi", "", tool_calls=[])


@pytest.mark.parametrize(
    "text, calls",
    [
        (block() + C.EOS, 0),
        (block(invoke()), 1),
        (block(invoke(parameter("a", "{oops", "false"))) + C.EOS, 1),
    ],
    ids=["empty block", "no EOS after a block", "invalid JSON value"],
)
def test_accepted_oddities(text, calls):
    assert len(parse_message_from_completion_text(text, "chat")["tool_calls"]) == calls


REJECTED = {
    "missing EOS": ("a", "chat", "missing end-of-sentence"),
    "missing </think>": ("a" + C.EOS, "thinking", "missing </think>"),
    "block inside reasoning": ("a" + block(invoke()) + C.EOS, "thinking", "inside reasoning"),
    "block after one newline": ("a" + block(invoke())[1:] + C.EOS, "chat", "DSML"),
    "block at the start": (block(invoke())[2:] + C.EOS, "chat", "DSML"),
    "text after the block": (block(invoke()) + "a" + C.EOS, "chat", "text after the tool"),
    "second block": (block(invoke()) * 2 + C.EOS, "chat", "text after the tool"),
    "text after EOS": (f"a{C.EOS}b", "chat", "text after the end"),
    "text after block and EOS": (block(invoke()) + C.EOS + "b", "chat", "text after the end"),
    "duplicate parameter": (
        block(invoke(parameter("a", "1"), parameter("a", "2"))) + C.EOS,
        "chat",
        "duplicate parameter 'a'",
    ),
    "no string attribute": (
        block(invoke(parameter("a", "1").replace(' string="true"', ""))) + C.EOS,
        "chat",
        "malformed parameter",
    ),
    "other string attribute": (
        block(invoke(parameter("a", "1", "maybe"))) + C.EOS,
        "chat",
        "malformed parameter",
    ),
    "JSON body": (block(invoke('{"a": 1}')) + C.EOS, "chat", "malformed invoke"),
    "no name": (block(invoke().replace("name=", "")) + C.EOS, "chat", "malformed invoke"),
    "text between calls": (block(invoke(), "a", invoke()) + C.EOS, "chat", "expected '>'"),
    "text between parameters": (
        block(invoke(parameter("a", "1") + "x", parameter("b", "1"))) + C.EOS,
        "chat",
        "after a parameter",
    ),
    "unclosed block": (OPEN + invoke() + C.EOS, "chat", "expected '>'"),
    "unclosed block at the end": (OPEN + invoke(), "chat", "no end"),
    "unclosed parameter": (
        OPEN + '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">1' + C.EOS,
        "chat",
        "malformed parameter",
    ),
    "BOS in content": (f"a{C.BOS}{C.EOS}", "chat", "inside content"),
    "<think> in content": (f"a<think>{C.EOS}", "chat", "inside content"),
    "</think> in content": (f"a</think>{C.EOS}", "chat", "inside content"),
    "second </think>": (f"r</think></think>a{C.EOS}", "thinking", "inside content"),
    "<think> in reasoning": (f"r<think></think>a{C.EOS}", "thinking", "inside reasoning"),
    "EOS in reasoning": (f"r{C.EOS}</think>a{C.EOS}", "thinking", "inside reasoning"),
    "DSML in reasoning": (f"r{C.DSML}</think>a{C.EOS}", "thinking", "inside reasoning"),
    "nothing": ("", "chat", "missing end-of-sentence"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name):
    text, mode, pattern = REJECTED[name]
    with pytest.raises(CompletionError, match=pattern) as caught:
        parse_message_from_completion_text(text, mode)
    assert isinstance(caught.value, ValueError)
    assert 0 <= caught.value.position <= len(text)


def test_unknown_mode():
    with pytest.raises(EncodingError, match="thinking_mode"):
        parse_message_from_completion_text("a" + C.EOS, "fast")


NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
FREE_TEXT = st.lists(
    st.one_of(
        st.text(max_size=12), st.sampled_from(["\n", "\n\n", "<", "</", '"', ">", "｜", "{"])
    ),
    max_size=6,
).map("".join)


def is_plain(text: str) -> bool:
    return not any(token in text for token in C.CONTROL_TOKENS)


TEXT = FREE_TEXT.filter(is_plain)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner | TEXT, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = TEXT.filter(lambda key: '"' not in key)
ARGUMENTS = st.dictionaries(KEYS, TEXT | JSON, max_size=4)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3)


@PROPERTY
@given(mode=st.sampled_from(["thinking", "chat"]), reasoning=TEXT, content=TEXT, calls=CALLS)
def test_encode_then_parse_gives_the_message_back(mode, reasoning, content, calls):
    before = [system("s", tools=[TOOL]), user("q")]
    turn = assistant(
        content,
        reasoning if mode == "thinking" else "",
        tool_calls=[call(name, json.dumps(arguments)) for name, arguments in calls],
    )
    prompt = encode_messages(before, mode)
    whole = encode_messages([*before, turn], mode)
    assert whole.startswith(prompt)
    parsed = parse_message_from_completion_text(whole[len(prompt) :], mode)
    got = [
        (c["function"]["name"], json.loads(c["function"]["arguments"]))
        for c in parsed.pop("tool_calls")
    ]
    assert got == calls
    turn.pop("tool_calls")
    assert parsed == turn
