"""What holds for every completion, however it is cut into tokens."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding import parse_message_from_completion_text
from dsv4_jax.encoding.dsml import write_tool_calls
from dsv4_jax.encoding.segments import SegmentWriter, join_segments
from tests.serving.completions import CONTROLS, TEXT_ID, Parsed, Token, cut, pieces, run
from tests.serving.test_parser import RULES

PROPERTY = settings(max_examples=200, deadline=None, database=None)
SHORT = {rule: completion for rule, (completion, *_) in RULES.items() if len(completion) < 1000}
MODES = [(True, True), (False, True), (True, False), (False, False)]  # reasoning, tools


def cut_at(tokens: list[Token], place: int) -> list[Token]:
    """Cuts the token that holds byte `place`, if it is text."""
    result: list[Token] = []
    for token, data in tokens:
        if token == TEXT_ID and 0 < place < len(data):
            result += [(token, data[:place]), (token, data[place:])]
        else:
            result.append((token, data))
        place -= len(data)
    return result


@pytest.mark.parametrize("rule", SHORT)
def test_every_split_gives_the_unsplit_result(rule):
    tokens = pieces(SHORT[rule])
    length = sum(len(data) for _, data in tokens)
    for reasoning, tools in MODES:
        for truncated in (False, True):
            how = {"reasoning": reasoning, "tools": tools, "truncated": truncated}
            whole = run(tokens, **how)[0]
            assert run(cut(tokens, [1] * length), **how)[0] == whole
            for place in range(1, length):
                assert run(cut_at(tokens, place), **how)[0] == whole


@given(st.sampled_from(sorted(SHORT)), st.lists(st.integers(1, 9), max_size=60), st.booleans())
@PROPERTY
def test_random_splits_give_the_unsplit_result(rule, sizes, reasoning):
    tokens = pieces(SHORT[rule])
    assert run(cut(tokens, sizes), reasoning=reasoning)[0] == run(tokens, reasoning=reasoning)[0]


@given(st.binary(max_size=12), st.lists(st.integers(1, 3), max_size=12))
@PROPERTY
def test_broken_utf8_does_not_depend_on_splits(data, sizes):
    whole = run([(TEXT_ID, data)])[0]
    assert whole.content == data.decode("utf-8", "replace")
    assert run(cut([(TEXT_ID, data)], sizes))[0] == whole


NAMES = st.text("abc_-", min_size=1, max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(NAMES, children, max_size=3),
    max_leaves=5,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, JSON, max_size=3)), max_size=3)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("<>/ \n"), max_size=20)


@given(TEXTS, TEXTS, CALLS, st.lists(st.integers(1, 9), max_size=80))
@PROPERTY
def test_what_the_encoder_writes_is_read_as_the_strict_parser_reads_it(
    reasoning, content, calls, sizes
):
    writer = SegmentWriter()
    writer.text(reasoning)
    writer.control(C.THINK_END)
    writer.text(content.rstrip() if calls else content)
    if calls:
        writer.text("\n\n")
        listed = [
            {"function": {"name": name, "arguments": json.dumps(arguments)}}
            for name, arguments in calls
        ]
        write_tool_calls(writer, listed, "messages[0]")
    tokens = [
        (CONTROLS[s.text] if s.is_control else TEXT_ID, s.text.encode()) for s in writer.segments()
    ]
    parsed = run(cut(tokens, sizes), reasoning=True)[0]
    strict = parse_message_from_completion_text(join_segments(writer.segments()) + C.EOS)
    assert parsed.reasoning == strict["reasoning_content"]
    assert parsed.content == strict["content"]
    assert parsed.names == [call["function"]["name"] for call in strict["tool_calls"]]
    assert [json.loads(text) for text in parsed.arguments] == [arguments for _, arguments in calls]


def check_promises(parsed: Parsed, truncated: bool) -> None:
    for text in (parsed.reasoning, parsed.content, *parsed.names, *parsed.arguments):
        assert not any(control in text for control in CONTROLS)
    if not truncated:
        assert all(isinstance(json.loads(text), dict) for text in parsed.arguments)


def mutate(tokens: list[Token], rng: random.Random) -> list[Token]:
    """Deletes, doubles, swaps, inserts and cuts a few tokens."""
    tokens = cut(tokens, [rng.randint(1, 30) for _ in range(rng.randint(0, 40))])
    controls = [(token, b"") for token in CONTROLS.values()]
    words = [b"<", b"</", b">", b'"', b"tool_calls>", b"invoke", b"\n\n", b'{"a":', b"\xe2\x82"]
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(tokens) + 1)
        match rng.randrange(4):
            case 0:
                tokens[place : place + rng.randint(1, 4)] = []
            case 1:
                tokens[place:place] = tokens[place : place + rng.randint(1, 5)]
            case 2:
                tokens.insert(place, rng.choice(controls))
            case 3:
                tokens.insert(place, (TEXT_ID, rng.choice(words)))
    return tokens


def fuzz(rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    completions = [pieces(completion) for completion in SHORT.values()]
    for _ in range(rounds):
        tokens = mutate(rng.choice(completions) + rng.choice(completions), rng)
        reasoning, tools = rng.choice(MODES)
        truncated = rng.random() < 0.2
        how = {"reasoning": reasoning, "tools": tools, "truncated": truncated}
        parsed = run(tokens, **how)[0]
        check_promises(parsed, truncated)
        finer = cut(tokens, [rng.randint(1, 5) for _ in range(500)])
        assert run(finer, **how)[0] == parsed


def test_mutations_never_raise_or_leak_markup():
    fuzz(rounds=1000, seed=1)


@pytest.mark.slow
def test_many_mutations_never_raise_or_leak_markup():
    fuzz(rounds=100_000, seed=2)


@pytest.mark.slow
def test_every_split_of_many_completions_gives_the_unsplit_result():
    rng, completions = random.Random(3), [pieces(text) for text in SHORT.values()]
    for index in range(500):
        tokens = mutate(rng.choice(completions), rng)
        reasoning, tools = MODES[index % len(MODES)]
        how = {"reasoning": reasoning, "tools": tools}
        whole = run(tokens, **how)[0]
        length = sum(len(data) for _, data in tokens)
        assert run(cut(tokens, [1] * length), **how)[0] == whole
        for place in range(1, length):
            assert run(cut_at(tokens, place), **how)[0] == whole
