"""Walks through grammars: whatever a guide lets pass is what was asked for."""

import json
import random
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import Any

import jsonschema
import numpy as np
import pytest

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding import parse_message_from_completion_text
from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.grammar import GrammarCompiler, ToolGrammar, reply_rules
from dsv4_jax.serving.grammar.guide import GrammarError, GrammarGuide
from dsv4_jax.serving.grammar.parameters import kinds_of
from dsv4_jax.serving.tool_fields import ReplyFormat
from dsv4_jax.tokenizer import Tokenizer
from tests.encoding import support

MOST = 200  # tokens of a walk; longer ones start again, with another seed
WALKS = 8
LETTERS = b'abc ,:"{}[]0123456789.</>\n\\trufalsen'


@cache
def tokenizer(name: str) -> Tokenizer:
    return support.demo_tokenizer() if name == "demo" else support.official_tokenizer()


@cache
def compiler(name: str) -> GrammarCompiler:
    return GrammarCompiler(tokenizer(name))


@cache
def favourites(name: str) -> tuple[np.ndarray, ...]:
    """Ids that make a text, and ids that bring it to an end."""
    tok = tokenizer(name)
    texts = [tok.token_bytes(index) for index in range(tok.vocab_size)]
    dull = np.array([set(text) <= set(LETTERS) for text in texts])
    closing = np.array([text[:1] in (b'"', b"}", b"]", b"<") for text in texts])
    return np.ones_like(dull), dull, closing, closing


def mask(guide: GrammarGuide, tok: Tokenizer) -> np.ndarray:
    """Which ids the guide lets pass."""
    words_W = np.zeros((tok.vocab_size + 31) // 32 + 2, np.uint32)
    words_W[-2:] = 0xFFFFFFFF
    assert guide.fill(words_W)
    assert not words_W[-2:].any()
    bits = np.unpackbits(words_W.view(np.uint8), bitorder="little")
    return bits[: tok.vocab_size].astype(bool)


def allowed(guide: GrammarGuide, tok: Tokenizer) -> list[int]:
    return np.flatnonzero(mask(guide, tok)).tolist()


def walk(rules: str, name: str, seed: int) -> str | None:
    """Returns a completion the guide lets pass, None if it did not end soon."""
    tok, rng, done = tokenizer(name), random.Random(seed), []
    guide = compiler(name).compile(rules, "x").guide()
    while len(done) < MOST:
        may = mask(guide, tok)
        assert may.any(), "nothing is allowed"
        assert may[tok.eos_id] == guide.may_end
        if may[tok.eos_id] and rng.random() < 0.5:
            return tok.decode(done)
        liked = np.flatnonzero(may & rng.choice(favourites(name)))
        token = int(rng.choice(liked if len(liked) else np.flatnonzero(may)))
        if token != tok.eos_id:
            guide.advance(token)
            done.append(token)
    return None


def walks(rules: str, name: str) -> list[str]:
    found = (walk(rules, name, seed) for seed in range(4 * WALKS))
    texts = list(islice((text for text in found if text is not None), WALKS))
    assert len(texts) >= 3, "too few walks came to an end"
    return texts


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 2, None]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {
        "$ref": "#/$defs/node",
        "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
    },
    {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "number"}]},
]


@pytest.mark.parametrize("name", ["demo", "official"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_walks_are_valid_json(schema, name):
    for text in walks(reply_rules(ReplyFormat("json_schema", schema)), name):
        jsonschema.validate(json.loads(text), schema)


TOOLS: list[dict[str, Any]] = [
    {"function": {"name": "now"}},
    {
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "limit": {"type": ["integer", "null"]},
                    "how": {"type": "string", "enum": ["fast", "deep"]},
                    "where": {"$ref": "#/$defs/place"},
                },
                "required": ["query"],
                "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}}},
            },
        }
    },
    {"function": {"name": "stop", "parameters": {"properties": {}, "additionalProperties": False}}},
]
STRICT = [{"function": {**tool["function"], "strict": True}} for tool in TOOLS]


def calls_of(text: str) -> list[dict[str, Any]]:
    message = parse_message_from_completion_text(text + C.EOS, "chat")
    assert message["content"] == ""
    return [call["function"] for call in message["tool_calls"]]


@pytest.mark.parametrize("name", ["demo", "official"])
@pytest.mark.parametrize("tools", [TOOLS, STRICT], ids=["structure", "strict"])
def test_walks_are_valid_calls(tools, name, monkeypatch):
    dsml = compiler(name).control(C.DSML)
    parameters = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    seen = set()
    for text in walks(ToolGrammar(dsml, tools).whole_block(), name):
        try:
            calls = calls_of(text)
        except ValueError as error:  # several values of one name are the parser's to drop
            assert tools is TOOLS and "duplicate" in str(error)
            continue
        for call in calls:
            seen.add(call["name"])
            arguments = json.loads(call["arguments"])
            schema = parameters[call["name"]] or {}
            if tools is STRICT:
                jsonschema.validate(arguments, schema)
            for key, value in arguments.items():
                own = schema.get("properties", {}).get(key)
                assert own is not None or not schema.get("properties")
                if own is not None:
                    jsonschema.validate(value, {"$defs": schema.get("$defs", {}), **own})
    assert seen


def text_of(rules: str, text: str) -> bool:
    """Whether the grammar lets `text` pass, to its end."""
    tok = tokenizer("demo")
    guide = compiler("demo").compile(rules, "x").guide()
    for token in tok.encode_text(text, "control"):
        if token not in allowed(guide, tok):
            return False
        guide.advance(token)
    return tok.eos_id in allowed(guide, tok)


def block(*calls: str) -> str:
    inside = "\n".join(calls)
    return f"\n\n<{C.DSML}tool_calls>\n{inside}\n</{C.DSML}tool_calls>"


def call(name: str, *parameters: str) -> str:
    inside = "\n".join(parameters)
    return f'<{C.DSML}invoke name="{name}">\n{inside}\n</{C.DSML}invoke>'


def value(name: str, text: str, is_string: str = "true") -> str:
    return f'<{C.DSML}parameter name="{name}" string="{is_string}">{text}</{C.DSML}parameter>'


FIND, NOW = call("find", value("query", "a</b>\n<｜DSML")), call("now")


@pytest.mark.parametrize(
    ("options", "text", "passes"),
    [
        ({}, block(FIND), True),
        ({}, block(NOW, FIND), True),
        ({"is_parallel": False}, block(NOW), True),
        ({"is_parallel": False}, block(NOW, NOW), False),
        ({"only": "now"}, block(NOW), True),
        ({"only": "now"}, block(FIND), False),
        ({}, block(call("other")), False),
        ({}, block(call("find", value("nope", "x"))), False),
        ({}, block(call("find", value("limit", "x"))), False),
        ({}, block(call("find", value("limit", "[]", "false"))), False),
        ({}, block(call("find", value("limit", "7", "false"))), True),
        ({}, block(call("find", value("how", "deep"), value("query", ""))), True),
        ({}, block(call("find", value("how", "deeper"))), False),
        ({}, block(call("find", value("where", '{"x": 1}', "false"))), True),
        ({}, block(call("find", value("where", '{"x": "1"}', "false"))), False),
        ({}, block(call("now", value("any", "x"), value("other", "[1]", "false"))), True),
        ({}, block(call("stop", value("any", "x"))), False),
        ({}, block(call("stop")), True),
        ({}, block(), False),
        ({}, "text", False),
    ],
)
def test_what_calls_pass(options, text, passes):
    rules = ToolGrammar(compiler("demo").control(C.DSML), TOOLS, **options)
    assert text_of(rules.whole_block(), text) is passes
    if text.startswith("\n\n<"):
        after = text.removeprefix(f"\n\n<{C.DSML}")
        assert text_of(rules.after_marker(), after) is passes


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (block(FIND), True),
        (block(call("find")), False),
        (block(call("find", value("limit", "1", "false"))), False),
        (block(call("find", value("query", "x"), value("query", "x"))), False),
        (block(call("find", value("query", "x"), value("how", "fast"))), True),
        (block(NOW), True),
        (block(call("now", value("any", "x"))), False),
    ],
)
def test_what_strict_calls_pass(text, passes):
    rules = ToolGrammar(compiler("demo").control(C.DSML), STRICT)
    assert text_of(rules.whole_block(), text) is passes


def strict_text(schema: dict[str, Any], text: str) -> bool:
    parameters = {"properties": {"p": {"type": "string", **schema}}, "required": ["p"]}
    tool = {"function": {"name": "f", "strict": True, "parameters": parameters}}
    rules = ToolGrammar(compiler("demo").control(C.DSML), [tool])
    return text_of(rules.whole_block(), block(call("f", value("p", text))))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"maxLength": 2}, "éé", "abc"),
        ({"minLength": 2}, "abc", "a"),
        ({"pattern": "^a/b$"}, "a/b", "xa/b"),
        ({"pattern": "b+"}, "abbc", "ac"),
        ({"const": 'q"u'}, 'q"u', "q"),
        ({"enum": ["a", "ab"]}, "ab", "abc"),
    ],
    ids=str,
)
def test_strict_texts(schema, good, bad):
    assert strict_text(schema, good)
    assert not strict_text(schema, bad)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"not": {"type": "string"}}, "not supported: not"),
        ({"type": "array", "uniqueItems": True}, "not supported: uniqueItems"),
        ({"type": "wizard"}, "wizard"),
        ({"type": "string", "pattern": "(?=x)"}, "look-around"),
        ({"type": "string", "format": "nope"}, "nope"),
        ({"$ref": "#/$defs/none"}, ""),
        ({"$ref": "http://example.com/schema"}, ""),
        ({"enum": []}, ""),
        ({"minLength": 5, "maxLength": 2, "type": "string"}, ""),
        ({"x": "y" * 300_000}, "larger than"),
    ],
    ids=lambda x: str(x)[:50],
)
def test_schemas_that_cannot_be_followed(schema, problem):
    with pytest.raises(ApiError) as caught:
        compiler("demo").compile(reply_rules(ReplyFormat("json_schema", schema)), "schema")
    assert (caught.value.status, caught.value.code) == (400, "invalid_schema")
    assert problem in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("regex", r"\d{3}/\d+", "123/4", "12/3"),
        ("regex", r"a\/b", "a/b", "a"),
        ("grammar", 'start: "x"+ "y"', "xxy", "xx"),
    ],
)
def test_expressions_and_grammars(kind, text, good, bad):
    rules = reply_rules(ReplyFormat(kind, text))
    assert text_of(rules, good)
    assert not text_of(rules, bad)


def test_control_tokens_cannot_be_spelled():
    rules = reply_rules(ReplyFormat("regex", "(?s:.*)"))
    tok = tokenizer("demo")
    may = allowed(compiler("demo").compile(rules, "x").guide(), tok)
    assert set(may) & tok.control_ids == {tok.eos_id}


def test_a_token_that_is_not_allowed_is_an_error():
    guide = compiler("demo").compile(reply_rules(ReplyFormat("regex", "a")), "x").guide()
    with pytest.raises(GrammarError):
        guide.advance(tokenizer("demo").eos_id)
    with pytest.raises(GrammarError):
        guide.fill(np.zeros(10, np.uint32))


@pytest.mark.parametrize("pattern", ["((a{1,100}){1,100}){1,100}", "(a*)*b", "(a|aa|a?){50}c"])
def test_explosive_expressions_are_bounded(pattern):
    """The matcher works with derivatives and limits: it goes on or it gives up, but returns."""
    guide = compiler("demo").compile(reply_rules(ReplyFormat("regex", pattern)), "x").guide()
    (token,) = tokenizer("demo").encode_text("a")
    with suppress(GrammarError):
        for _ in range(60):
            assert token in allowed(guide, tokenizer("demo"))
            guide.advance(token)


def test_guides_do_not_share_progress():
    grammar = compiler("demo").compile(reply_rules(ReplyFormat("regex", "ab")), "x")
    (first,) = tokenizer("demo").encode_text("a")
    grammar.guide().advance(first)
    assert allowed(grammar.guide(), tokenizer("demo")) == [first]


def test_wrong_masks_are_refused():
    guide = compiler("demo").compile(reply_rules(ReplyFormat("regex", "ab")), "x").guide()
    with pytest.raises(ValueError, match="words_W"):
        guide.fill(np.zeros(10, np.uint8))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "schema", [{"type": "integer"}, {"$ref": "#/$defs/a"}], ids=["plain", "ref"]
)
def test_rules_that_become_too_large_are_given_up_early(schema, strict, monkeypatch):
    def count(value, *rest):
        seen.append(value)
        return kinds_of(value, *rest)

    seen: list[Any] = []
    monkeypatch.setattr("dsv4_jax.serving.grammar.tools.kinds_of", count)
    parameters = {"properties": {f"p{i}": schema for i in range(20_000)}, "$defs": {"a": {}}}
    tool = {"function": {"name": "f", "parameters": parameters, "strict": strict}}
    with pytest.raises(ApiError, match="too large") as caught:
        ToolGrammar("<[128825]>", [tool])
    assert caught.value.code == "invalid_schema"
    assert len(seen) < 5000  # what comes behind is not even looked at
