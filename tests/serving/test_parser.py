"""Every rule of the parser, one completion each."""

import json

import pytest

from dsv4_jax.serving.events import Reasoning, ToolArguments
from dsv4_jax.serving.parser import CompletionParser
from tests.serving.completions import (
    CONTROLS,
    IDS,
    TEXT_ID,
    block,
    cut,
    invoke,
    json_parameter,
    pieces,
    run,
    text_parameter,
)

CALL = invoke("f", text_parameter("a", "x"))
CALLED = '{"a": "x"}'

# completion, starts in reasoning, reasoning, content, arguments of each call, counted repairs
RULES = {
    "plain answer": ("Hi there. ", False, "", "Hi there. ", [], ()),
    "reasoning": ("think\n</think>\n\nHi", True, "think\n", "\n\nHi", [], ()),
    "reasoning only": ("still thinking", True, "still thinking", "", [], ()),
    "empty reasoning": ("</think>Hi", True, "", "Hi", [], ()),
    "think start in reasoning": ("<think>a</think>b", True, "a", "b", [], ("stray_control",)),
    "second think end": ("a</think>b</think>c", True, "a", "bc", [], ("stray_control",)),
    "think tokens in content": ("a<think>b</think>c", False, "", "abc", [], ("stray_control",)),
    "other control token": ("a<｜User｜>b", False, "", "ab", [], ("stray_control",)),
    "angle brackets": ("a < b </ c <d> </e", False, "", "a < b </ c <d> </e", [], ()),
    "lookalike": ("<|DSML|tool_calls>", False, "", "<|DSML|tool_calls>", [], ()),
    "call": (f"Look:\n\n{block(CALL)}", False, "", "Look:", [CALLED], ()),
    "call after reasoning": (f"t</think>\n\n{block(CALL)}", True, "t", "", [CALLED], ()),
    "two calls": (block(CALL, CALL), False, "", "", [CALLED, CALLED], ()),
    "no arguments": (block(invoke("f")), False, "", "", ["{}"], ()),
    "empty block": ("a\n\n" + block(), False, "", "a", [], ()),
    "call in reasoning": (
        f"t\n\n{block(CALL)}",
        True,
        "t",
        "",
        [CALLED],
        ("implicit_think_end",),
    ),
    "marker in reasoning": (
        "a <｜DSML｜invoke> b</think>c",
        True,
        "a <invoke> b",
        "c",
        [],
        ("bad_tag",),
    ),
    "closer in reasoning": ("a</｜DSML｜x</think>", True, "a</x", "", [], ("stray_marker",)),
    "call without block": (f"a\n{CALL}", False, "", "a", [CALLED], ("unopened_block",)),
    "text behind a call without block": (
        f"{CALL}\nDone.",
        False,
        "",
        "Done.",
        [CALLED],
        ("unopened_block", "text_after_tools"),
    ),
    "marker in content": ("a <｜DSML｜b> c", False, "", "a <b> c", [], ("bad_tag",)),
    "bare marker": ("a｜DSML｜b", False, "", "ab", [], ("stray_marker",)),
    "closer in content": ("a </｜DSML｜invoke> b", False, "", "a  b", [], ("stray_tag",)),
    "parameter in content": (
        '<｜DSML｜parameter name="a">',
        False,
        "",
        '<parameter name="a">',
        [],
        ("bad_tag",),
    ),
    "string parameter": (
        block(invoke("f", text_parameter("a", 'q"\\\n\té😀 </b> <c'))),
        False,
        "",
        "",
        [json.dumps({"a": 'q"\\\n\té😀 </b> <c'}, ensure_ascii=False)],
        (),
    ),
    "markers in a string parameter": (
        block(invoke("f", text_parameter("a", "<｜DSML｜invoke </｜DSML｜b> ｜DSML｜"))),
        False,
        "",
        "",
        ['{"a": "<invoke </b> "}'],
        ("stray_marker", "bad_tag"),
    ),
    "json parameters": (
        block(invoke("f", json_parameter("a", " [1, {}] "), json_parameter("b", "null"))),
        False,
        "",
        "",
        ['{"a": [1, {}], "b": null}'],
        (),
    ),
    "bad json": (
        block(invoke("f", json_parameter("a", "[1,"), json_parameter("b", "NaN"))),
        False,
        "",
        "",
        ['{"a": "[1,", "b": "NaN"}'],
        ("bad_parameter_json",),
    ),
    "json nested too deep": (
        block(invoke("f", json_parameter("a", "[" * 50_000))),
        False,
        "",
        "",
        ['{"a": "' + "[" * 50_000 + '"}'],
        ("bad_parameter_json",),
    ),
    "parameter without type": (
        block(invoke("f", '<｜DSML｜parameter name="a">1</｜DSML｜parameter>')),
        False,
        "",
        "",
        ['{"a": 1}'],
        ("untyped_parameter",),
    ),
    "attributes without quotes": (
        block(invoke("f", "<｜DSML｜parameter name=a string=true>1</｜DSML｜parameter>")),
        False,
        "",
        "",
        ['{"a": "1"}'],
        (),
    ),
    "odd names": (
        block(invoke("f", text_parameter('a"b', "x"), text_parameter("c>d", "y"))),
        False,
        "",
        "",
        ['{"a\\"b": "x", "c>d": "y"}'],
        (),
    ),
    "duplicate parameter": (
        block(invoke("f", text_parameter("a", "x"), json_parameter("a", "1"))),
        False,
        "",
        "",
        [CALLED],
        ("duplicate_parameter",),
    ),
    "json body": (block(invoke("f", '{"a": [1]}')), False, "", "", ['{"a": [1]}'], ("json_body",)),
    "other body": (
        block(invoke("f", "a = 1")),
        False,
        "",
        "",
        ['{"arguments": "a = 1"}'],
        ("json_body",),
    ),
    "body beside parameters": (
        block(invoke("f", "{}", text_parameter("a", "x"), "{}")),
        False,
        "",
        "",
        [CALLED],
        ("stray_text",),
    ),
    "parameter never closed": (
        block(CALL.replace("</｜DSML｜parameter>", "")).replace("x\n", "x"),
        False,
        "",
        "",
        [CALLED],
        ("unclosed_parameter",),
    ),
    "call never closed": (
        block('<｜DSML｜invoke name="f">', CALL),
        False,
        "",
        "",
        ["{}", CALLED],
        (),
    ),
    "nothing closed": (
        '<｜DSML｜tool_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="true">x',
        False,
        "",
        "",
        [CALLED],
        ("unclosed_parameter",),
    ),
    "text between calls": (block("oops", CALL), False, "", "", [CALLED], ("stray_text",)),
    "text after the block": (
        f"a{block(CALL)}\n\n b ",
        False,
        "",
        "ab ",
        [CALLED],
        ("text_after_tools",),
    ),
    "second block": (
        f"{block(CALL)}\n{block(CALL)}",
        False,
        "",
        "",
        [CALLED, CALLED],
        ("extra_block",),
    ),
    "unknown tool": (block(invoke("h")), False, "", "", ["{}"], ("unknown_tool",)),
    "invalid utf-8 is replaced": ("a\ufffdb", False, "", "a\ufffdb", [], ()),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    completion, reasoning, *expected, counts = RULES[rule]
    parsed, parser = run(pieces(completion), reasoning=reasoning)
    assert [parsed.reasoning, parsed.content, parsed.arguments] == expected
    counted = {kind for kind, count in parser.counts.items() if count}
    assert counted >= set(counts)
    if not counts:
        assert not counted


def test_without_tools_markup_is_text_without_its_marker():
    parsed, _ = run(pieces(f"a\n{block(CALL)}"), tools=False)
    assert parsed.content == f"a\n{block(CALL)}".replace("｜DSML｜", "")
    assert parsed.names == []


def test_without_tools_reasoning_goes_on_past_a_block():
    parsed, _ = run(pieces("a<｜DSML｜tool_calls>b</think>c"), reasoning=True, tools=False)
    assert (parsed.reasoning, parsed.content) == ("a<tool_calls>b", "c")


@pytest.mark.parametrize(
    ("completion", "content", "arguments"),
    [
        ("a \n", "a \n", []),
        ("a <", "a <", []),
        ("a\n\n<｜DSML｜tool_c", "a", []),
        ("<｜DSML｜tool_calls><｜DSML｜invoke name", "", []),
        ('<｜DSML｜tool_calls><｜DSML｜invoke name="f">', "", [""]),
        ('<｜DSML｜tool_calls><｜DSML｜invoke name="f">{"a', "", ['{"a']),
        (block(CALL)[:-40], "", [CALLED[:-2]]),
    ],
)
def test_a_truncated_completion_keeps_open_what_was_open(completion, content, arguments):
    parsed, _ = run(pieces(completion), truncated=True)
    assert (parsed.content, parsed.arguments) == (content, arguments)


def test_truncated_inside_values():
    start = '<｜DSML｜tool_calls><｜DSML｜invoke name="f">'
    string = '<｜DSML｜parameter name="a" string="true">xy</'
    parsed, _ = run(pieces(start + string), truncated=True)
    assert parsed.arguments == ['{"a": "xy</']
    number = '<｜DSML｜parameter name="a" string="false">[1, 2'
    parsed, _ = run(pieces(start + number), truncated=True)
    assert parsed.arguments == ['{"a": [1, 2']


def test_characters_cut_in_half_wait_for_the_rest():
    parser = CompletionParser(IDS, reasoning=True, tools=False)
    euro = "€".encode()
    assert parser.feed(TEXT_ID, euro[:2]) == []
    assert parser.feed(TEXT_ID, euro[2:]) == [Reasoning("€")]


def test_half_a_character_before_a_control_token_is_replaced():
    parser = CompletionParser(IDS, reasoning=True, tools=False)
    parser.feed(TEXT_ID, "€".encode()[:2])
    assert parser.feed(IDS.think_end, b"") == [Reasoning("\ufffd")]


def test_long_string_arguments_are_streamed_token_by_token():
    parser = CompletionParser(IDS, reasoning=False, tools=True)
    for token, data in pieces(block(CALL).partition("x")[0]):
        parser.feed(token, data)
    for _ in range(1000):
        events = parser.feed(TEXT_ID, b"0123456789" * 10)
        assert events == [ToolArguments(0, "0123456789" * 10)]


def test_long_whitespace_takes_linear_time():
    parser = CompletionParser(IDS, reasoning=False, tools=True)
    for _ in range(200_000):
        parser.feed(TEXT_ID, b" ")
    [event] = parser.finish(truncated=False)
    assert event.text == " " * 200_000


def spelled(completion, bar="|"):
    """A completion as one token of text, its markers included."""
    return [(TEXT_ID, completion.replace("｜DSML｜", f"{bar}DSML{bar}").encode())]


@pytest.mark.parametrize("bar", ["|", "｜"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_spelled_markers_count_if_asked_for(bar, size):
    tokens = cut(spelled(f"Look:\n\n{block(CALL, CALL)}", bar), [size] * 1000)
    parsed, parser = run(tokens, spelled_markers=True)
    assert (parsed.content, parsed.arguments) == ("Look:", [CALLED, CALLED])
    assert parser.counts["spelled_marker"] == 10  # two of each call's, parameter's and the block's


LOOKALIKES = ("a <|DSML|b> c", "a </|DSML|x", "<|DSML|tool_calls", "a <|DS", "<|DSML|<|DSML|")


@pytest.mark.parametrize("text", LOOKALIKES)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_spelled_markers_that_begin_no_tag_are_text(text, size):
    parsed, parser = run(cut([(TEXT_ID, text.encode())], [size] * 100), spelled_markers=True)
    assert parsed.content == text and not parsed.names and not parser.counts.total()


def test_spelled_markers_are_text_while_thinking_and_without_tools():
    tokens = spelled(f"a{block(CALL)}")
    text = tokens[0][1].decode()
    assert run(tokens, reasoning=True, spelled_markers=True)[0].reasoning == text
    assert run(tokens, tools=False, spelled_markers=True)[0].content == text


def test_the_controls_of_these_tests_are_all_known():
    assert IDS.all == set(CONTROLS.values())
