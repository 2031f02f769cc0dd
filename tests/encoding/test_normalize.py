"""From API requests to encoder messages."""

import copy

import pytest

from dsv4_jax.encoding import (
    EncodingError,
    encode_messages,
    normalize_messages,
    render_segments,
    starts_in_reasoning,
)
from dsv4_jax.encoding import constants as C
from tests.encoding import support
from tests.encoding.support import TOOL, assistant, call, result, system, user

B, U, A, E = C.BOS, C.USER, C.ASSISTANT, C.EOS
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
SCHEMA_TEXT = C.RESPONSE_FORMAT_HEAD + '{"type": "object"}'
TOOL_TEXT = (
    C.TOOLS_HEAD
    + '{"name": "f", "description": "ä", "parameters": {"type": "object"}}'
    + C.TOOLS_TAIL
)


def prompt(messages, mode="thinking", drop_thinking=True, **options) -> str:
    before = copy.deepcopy(messages)
    normalized = normalize_messages(messages, **options)
    assert messages == before, "the input must not be modified"
    return encode_messages(normalized, mode, drop_thinking=drop_thinking)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_published_examples_stay_the_same(number):
    messages, mode, expected = support.example(number)
    messages.append(user("next"))
    expected = encode_messages(messages, mode, drop_thinking=False)
    assert prompt(messages, mode, drop_thinking=False, internal_roles=True) == expected


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


PROMPTS = {
    "text parts": ([user(parts("a", "b"))], {}, f"{B}{U}a\n\nb{A}<think>"),
    "null content": ([user(None), user("b")], {}, f"{B}{U}\n\nb{A}<think>"),
    "developer is system": (
        [{"role": "developer", "content": "D"}, user("a")],
        {},
        f"{B}D{U}a{A}<think>",
    ),
    "developer, internal": (
        [{"role": "developer", "content": "D"}],
        {"internal_roles": True},
        f"{B}{U}D{A}<think>",
    ),
    "developer with tools, internal": (
        [{"role": "developer", "content": "D", "tools": [TOOL], "response_format": {"a": 1}}],
        {"internal_roles": True},
        f'{B}{U}D\n\n{TOOL_TEXT}\n\n{C.RESPONSE_FORMAT_HEAD}{{"a": 1}}{A}<think>',
    ),
    "systems merge": ([system("a"), system("b"), user("c")], {}, f"{B}a\n\nb{U}c{A}<think>"),
    "empty system": ([system(""), system("b"), user("c")], {}, f"{B}b{U}c{A}<think>"),
    "tools on first system": (
        [user("a"), system("S"), system("T"), user("b")],
        {"tools": [TOOL]},
        f"{B}{U}aS\n\nT\n\n{TOOL_TEXT}{U}b{A}<think>",
    ),
    "tools without system": (
        [user("a")],
        {"tools": [TOOL]},
        f"{B}\n\n{TOOL_TEXT}{U}a{A}<think>",
    ),
    "request tools replace": (
        [system("S", tools=[{"type": "function", "function": {"name": "old"}}]), user("a")],
        {"tools": [TOOL]},
        f"{B}S\n\n{TOOL_TEXT}{U}a{A}<think>",
    ),
    "message tools": ([system("S", tools=[TOOL]), user("a")], {}, f"{B}S\n\n{TOOL_TEXT}{U}a{A}"),
    "schema": (
        [user("a")],
        {"response_format": SCHEMA},
        f"{B}\n\n{SCHEMA_TEXT}{U}a{A}<think>",
    ),
    "tools and schema": (
        [system("S"), user("a")],
        {"response_format": SCHEMA, "tools": [TOOL]},
        f"{B}S\n\n{TOOL_TEXT}\n\n{SCHEMA_TEXT}{U}a{A}<think>",
    ),
    "no schema": ([user("a")], {"response_format": {"type": "json_object"}}, f"{B}{U}a{A}"),
    "assistants merge": (
        [user("q"), assistant("a"), assistant("b"), user("c")],
        {},
        f"{B}{U}q{A}</think>a\n\nb{E}{U}c{A}<think>",
    ),
    "system last": (
        [user("q"), assistant("a"), system("S")],
        {},
        f"{B}{U}q{A}<think></think>a{E}S{A}<think>",
    ),
    "only system": ([system("S")], {}, f"{B}S{A}<think>"),
    "task survives a merge": (
        [user("a"), user("b", task="query")],
        {},
        f"{B}{U}a\n\nb<｜query｜>",
    ),
    "task survives tool results": (
        [result("1", "R"), user("b")],
        {"task": "action"},
        f"{B}{U}<tool_result>R</tool_result>\n\nb{A}<think><｜action｜>",
    ),
    "title": ([user("q"), assistant("a")], {"task": "title"}, f"a{E}<｜title｜>"),
    "url": (
        [user("q")],
        {"task": "read_url", "extracted_url": "http://x"},
        f"{B}{U}q<｜extracted_url｜>http://x<｜read_url｜>",
    ),
    "prefix": (
        [user("q"), assistant("Well,", prefix=True)],
        {},
        f"{B}{U}q{A}<think></think>Well,",
    ),
    "prefix with reasoning": (
        [user("q"), assistant("Well,", "r")],
        {"continue_final_message": True},
        f"{B}{U}q{A}<think>r</think>Well,",
    ),
    "reasoning continues": (
        [user("q"), assistant("", "Hm", prefix=True)],
        {},
        f"{B}{U}q{A}<think>Hm",
    ),
    "other reasoning name": (
        [user("q"), {"role": "assistant", "content": "a", "reasoning": "r", "prefix": True}],
        {},
        f"{B}{U}q{A}<think>r</think>a",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt(name):
    messages, options, expected = PROMPTS[name]
    text = prompt(messages, **options)
    assert text.startswith(expected) if expected.startswith(B) else text.endswith(expected)
    assert not expected.endswith("<think>") or text == expected


def test_strict_is_not_rendered():
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    assert prompt([user("a")], tools=[strict]) == prompt([user("a")], tools=[TOOL])


def test_hidden_tools_still_keep_reasoning():
    messages = [user("q"), assistant("a", "why"), user("b")]
    assert "why" not in prompt(messages)
    shown = prompt(messages, tools=[TOOL])
    hidden = prompt(messages, tools=[TOOL], show_tools=False)
    assert "why" in shown and "why" in hidden
    assert hidden == shown.replace(f"\n\n{TOOL_TEXT}", "")


def test_results_follow_the_calls_and_unknown_ones_come_last():
    calls = [call("f", "{}", "1"), call("g", "{}", "2")]
    results = [result("?", "R?"), result("2", "R2"), user("and?"), result("1", "R1")]
    text = prompt([user("q"), assistant(tool_calls=calls), *results])
    order = [text.index(part) for part in ("R1", "R2", "and?", "R?")]
    assert order == sorted(order)


def test_results_follow_the_latest_calls():
    turns = [user("q")]
    for order in (("1", "2"), ("2", "1")):
        turns.append(assistant(tool_calls=[call("f", "{}", i) for i in order]))
        turns += [result("1", "R1"), result("2", "R2")]
    text = prompt(turns)
    assert text.rindex("R2") < text.rindex("R1") and text.index("R1") < text.index("R2")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"a": 1.0, "b": "ü"}, ('name="a" string="false">1.0<', 'name="b" string="true">ü<')),
        ('{"b": 2, "a": [1]}', ('name="b" string="false">2<', 'name="a" string="false">[1]<')),
        ("oops", ('name="arguments" string="true">oops<',)),
        ("", ('invoke name="f">\n\n</',)),
        (None, ('invoke name="f">\n\n</',)),
    ],
)
def test_arguments(arguments, expected):
    text = prompt([user("q"), assistant(tool_calls=[call("f", arguments)]), result("1", "")])
    positions = [text.replace(C.DSML, "").index(part) for part in expected]
    assert positions == sorted(positions)


def test_missing_reasoning_is_restored_by_call_id():
    seen = []

    def restore(ids):
        seen.append(list(ids))
        return "as before"

    turns = [user("q"), assistant(tool_calls=[call("f", "{}", "x")]), result("x", "R")]
    options = {"tools": [TOOL], "restore_reasoning": restore}
    assert f"{A}<think>as before</think>" in prompt(turns, **options)
    assert seen == [["x"]]
    turns[1]["reasoning_content"] = "given"
    assert "<think>given</think>" in prompt(turns, **options)
    assert len(seen) == 1


def test_missing_reasoning_renders_empty_or_is_refused():
    turns = [user("q"), assistant(tool_calls=[call("f", "{}", "x")]), result("x", "R")]
    assert f"{A}<think></think>\n\n" in prompt(turns, tools=[TOOL])
    with pytest.raises(EncodingError, match=r"messages\[1\].reasoning_content: is required"):
        normalize_messages(turns, require_reasoning=True)


def test_reasoning_that_continues_is_seen_by_the_parser_start():
    turns = [user("q"), assistant("", "Hm", prefix=True)]
    assert starts_in_reasoning(render_segments(normalize_messages(turns)))
    assert not starts_in_reasoning(render_segments(normalize_messages(turns), "chat"))


BAD_ARGUMENTS = r"messages\[0\].tool_calls\[0\].function.arguments"
ORDER, VALUE = "invalid_message_order", "invalid_value"
ERRORS = {
    "empty": ([], {}, "messages: must not be empty", ORDER),
    "message": (["a"], {}, r"messages\[0\]: must be an object", VALUE),
    "role": ([{"role": "bot"}], {}, r"messages\[0\].role: 'bot' is not one of", VALUE),
    "reminder": (
        [{"role": "latest_reminder", "content": "a"}],
        {},
        r"messages\[0\].role",
        VALUE,
    ),
    "image": (
        [user([{"type": "image_url"}])],
        {},
        r"messages\[0\].content\[0\]: part type 'image_url'",
        "unsupported_content_type",
    ),
    "content": ([user(3)], {}, r"messages\[0\].content: must be text", VALUE),
    "part": (
        [user([{"type": "text", "text": 3}])],
        {},
        r"content\[0\].text: must",
        VALUE,
    ),
    "surrogate": (
        [user("ab\ud800")],
        {},
        r"lone surrogate U\+D800 at character 2",
        VALUE,
    ),
    "escaped surrogate": (
        [assistant(tool_calls=[call("f", '{"a": "\\ud800"}')])],
        {},
        BAD_ARGUMENTS + r".a: lone surrogate",
        VALUE,
    ),
    "NaN": (
        [assistant(tool_calls=[call("f", '{"a": NaN}')])],
        {},
        BAD_ARGUMENTS + ": NaN is not JSON",
        VALUE,
    ),
    "infinity": (
        [assistant(tool_calls=[call("f", {"a": float("inf")})])],
        {},
        BAD_ARGUMENTS + ".a: inf is not JSON",
        VALUE,
    ),
    "huge number": (
        [assistant(tool_calls=[call("f", '{"a": 1e999}')])],
        {},
        BAD_ARGUMENTS + ".a: inf is not JSON",
        VALUE,
    ),
    "arguments": (
        [assistant(tool_calls=[call("f", "[1]")])],
        {},
        BAD_ARGUMENTS + ": must hold a JSON object",
        VALUE,
    ),
    "deep arguments": (
        [assistant(tool_calls=[call("f", '{"a":' + "[" * 10**5 + "]" * 10**5 + "}")])],
        {},
        BAD_ARGUMENTS + ".*nested deeper",
        VALUE,
    ),
    "call name": (
        [assistant(tool_calls=[call("", "{}")])],
        {},
        "name: is missing",
        VALUE,
    ),
    "calls": ([assistant(tool_calls={})], {}, "tool_calls: must be a list", VALUE),
    "tool": ([user("a")], {"tools": [{}]}, r"^tools\[0\]: needs a `function`", VALUE),
    "tool set": (
        [user("a")],
        {"tools": [{"function": {"name": "f", "x": {1}}}]},
        r"^tools\[0\].function.x: set is not JSON",
        VALUE,
    ),
    "schema": (
        [user("a")],
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema.schema: must be an object",
        "invalid_schema",
    ),
    "assistant last": (
        [user("a"), assistant("b")],
        {},
        r"messages\[1\]: is an assistant message",
        ORDER,
    ),
    "continue user": (
        [user("a")],
        {"continue_final_message": True},
        r"messages\[0\]: only an assistant message continues",
        ORDER,
    ),
    "continue calls": (
        [user("a"), assistant(tool_calls=[call("f", "{}")], prefix=True)],
        {},
        r"messages\[1\].tool_calls: a turn that calls tools",
        VALUE,
    ),
    "early prefix": (
        [assistant("a", prefix=True), user("b")],
        {},
        r"messages\[0\].prefix: `prefix` is for the last",
        ORDER,
    ),
    "reminder last": (
        [user("a"), {"role": "latest_reminder", "content": "r"}],
        {"internal_roles": True},
        r"messages\[1\]: is a reminder",
        ORDER,
    ),
    "task": ([user("a")], {"task": "poem"}, "task: 'poem' is not one of", VALUE),
    "message task": ([user("a", task="x")], {}, r"messages\[0\].task: 'x' is not", VALUE),
    "title of user": ([user("a")], {"task": "title"}, "task: 'title' needs", ORDER),
    "url missing": ([user("a")], {"task": "read_url"}, "extracted_urls: the task", VALUE),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_field_and_code(name):
    messages, options, pattern, code = ERRORS[name]
    with pytest.raises(EncodingError, match=pattern) as caught:
        normalize_messages(messages, **options)
    assert caught.value.code == code
