"""Tokenising without surprises: injection, policies, decoding, other vocabularies."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_jax.encoding import Segment, encode_messages, render_segments
from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.tokenizer import IncrementalDecoder, Tokenizer, TokenizerError
from tests.encoding import support
from tests.encoding.support import PROPERTY, assistant, call, result, system, user


def added_tokens(tokenizer: Tokenizer) -> list[str]:
    names = [tokenizer.token_bytes(index).decode() for index in sorted(tokenizer.control_ids)]
    assert len(names) > 50
    return names


def poisoned(text: str, half: int) -> list[dict]:
    """A conversation with `text` wherever a client can put text, whole, escaped and in halves."""
    escaped = json.dumps({"a": text, text.replace('"', ""): [text]})
    tool = {"type": "function", "function": {"name": "f", "description": text}}
    return [
        system(text, tools=[tool], response_format={"enum": [text]}),
        user(text),
        assistant(text, text, tool_calls=[call(text, escaped), call("g", text)]),
        result("1", text),
        result("2", [{"type": "text", "text": text}]),
        user(text[:half]),
        user(text[half:]),
    ]


def control_ids_in(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [index for index in ids if index in tokenizer.control_ids]


def test_no_added_token_can_be_injected(tokenizer):
    clean = render_segments(poisoned("word", 2))
    expected = control_ids_in(tokenizer, tokenizer.encode_segments(clean))
    for token in added_tokens(tokenizer):
        messages = poisoned(token, len(token) // 2)
        ids = tokenizer.encode_segments(render_segments(messages))
        assert control_ids_in(tokenizer, ids) == expected, token
        assert tokenizer.decode(ids) == encode_messages(messages), token


def test_all_added_tokens_at_once(tokenizer):
    text = "".join(added_tokens(tokenizer))
    ids = tokenizer.encode_text(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_text(text, "control") == sorted(tokenizer.control_ids)


def test_policies(tokenizer):
    text = f"a{C.USER}b"
    middle = tokenizer.control_id(C.USER)
    assert middle not in tokenizer.encode_text(text)
    assert tokenizer.encode_text(text, "control")[1] == middle
    with pytest.raises(TokenizerError, match="text contains the control token <｜User｜>"):
        tokenizer.encode_text(text, "reject")
    assert tokenizer.encode_text("plain", "reject") == tokenizer.encode_text("plain")
    with pytest.raises(TokenizerError, match="special_tokens_in_text='drop' must be"):
        tokenizer.encode_text(text, "drop")


def test_policies_leave_control_segments_alone(tokenizer):
    segments = [Segment(C.USER, True), Segment("a", False)]
    for policy in ("text", "control", "reject"):
        ids = tokenizer.encode_segments(segments, policy)
        assert ids == [tokenizer.control_id(C.USER), *tokenizer.encode_text("a")]


def test_no_token_is_added_around_text(tokenizer):
    assert tokenizer.encode_text("") == []
    assert tokenizer.bos_id not in tokenizer.encode_text("a")


def test_tool_markup_is_six_tokens(official):
    ids = official.encode_text(f"<{C.DSML}tool_calls>", "control")
    assert ids == [30, 128825, 72461, 4941, 12548, 32]


@PROPERTY
@given(st.text(max_size=60))
def test_text_survives(text):
    tokenizer = support.demo_tokenizer()
    ids = tokenizer.encode_text(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@PROPERTY
@given(st.text(max_size=60))
def test_text_survives_the_official_tokenizer(text):
    tokenizer = support.official_tokenizer()
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_long_texts_are_cached_and_stay_equal(demo):
    text = "x" * 2000
    first = demo.encode_text(text)
    first.append(-1)
    assert demo.encode_text(text) == [demo.encode_text("x")[0]] * 2000


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        tokenizer.encode_text("a\ud800")


def test_partial_utf8_tokens_of_the_official_vocabulary(official):
    def is_partial(data: bytes) -> bool:
        try:
            data.decode()
        except UnicodeDecodeError:
            return True
        return False

    assert sum(is_partial(official.token_bytes(i)) for i in range(128_000)) == 1470


def test_decode_agrees_with_the_library(official):
    text = "The naïve 试验 🙂🏽 — 1234 ｜ ok\n\n"
    ids = official.encode_text(text)
    assert official._full.decode(ids, skip_special_tokens=False) == official.decode(ids) == text


def test_decode_can_skip_control_tokens(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode_text("hi"), tokenizer.control_id(C.DSML)]
    assert tokenizer.decode(ids) == f"{C.BOS}hi{C.DSML}"
    assert tokenizer.decode(ids, skip_control=True) == "hi"


def test_ids_without_a_token(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"
    with pytest.raises(TokenizerError, match="-1 is negative"):
        tokenizer.decode([-1])


STREAMS = [
    "naïve 试验 🙂🏽 ok".encode(),
    "é".encode()[:1] + b"a",
    b"\xf0\x9f\x99" + "é".encode(),
    b"\xff\xfe" + "好".encode()[:2],
    b"",
]


@pytest.mark.parametrize("data", STREAMS)
def test_incremental_decoding_at_every_split(data):
    expected = data.decode("utf-8", "replace")
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            decoder = IncrementalDecoder(lambda index: b"")
            pieces = (data[:first], data[first:second], data[second:])
            text = "".join(decoder.push_bytes(piece) for piece in pieces)
            assert text + decoder.flush() == expected
            assert decoder.pending == b""


def test_incremental_decoding_holds_unfinished_characters(demo):
    decoder = demo.incremental_decoder()
    ids = demo.encode_text("🙂")
    assert [decoder.push(index) for index in ids] == ["", "", "", "🙂"]
    assert decoder.push(ids[0]) == "" and decoder.pending == b"\xf0"
    assert decoder.push(demo.encode_text("a")[0]) == "\ufffda"
    assert decoder.flush() == ""


def test_incremental_decoding_can_skip_control_tokens(demo):
    decoder = demo.incremental_decoder(skip_control=True)
    assert decoder.push(demo.eos_id) == ""
    assert demo.incremental_decoder().push(demo.eos_id) == C.EOS


@PROPERTY
@given(st.lists(st.integers(0, 129_279), max_size=30))
def test_incremental_decoding_of_any_ids(ids):
    tokenizer = support.official_tokenizer()
    decoder = tokenizer.incremental_decoder()
    text = "".join(decoder.push(index) for index in ids) + decoder.flush()
    assert text == tokenizer.decode(ids)


def test_missing_file(tmp_path):
    with pytest.raises(TokenizerError, match="tokenizer.json does not exist: .* token ids only"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {}}'])
def test_broken_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="tokenizer.json: not a usable tokenizer file"):
        Tokenizer.from_dir(tmp_path)


def demo_spec() -> dict:
    return json.loads(build_byte_tokenizer().to_str())


def test_missing_control_tokens_are_named():
    spec = demo_spec()
    for entry in spec["added_tokens"]:
        if entry["content"] in (C.USER, C.DSML):
            entry["content"] += "x"
    with pytest.raises(TokenizerError, match="lacks the control tokens <｜User｜>, ｜DSML｜"):
        Tokenizer(json.dumps(spec))


def test_rare_control_tokens_may_be_missing_until_used():
    spec = demo_spec()
    for entry in spec["added_tokens"]:
        if entry["content"] == C.FIM_HOLE:
            entry["content"] = "<other>"
    tokenizer = Tokenizer(json.dumps(spec), source="here")
    with pytest.raises(TokenizerError, match="here: lacks the control token <｜fim▁hole｜>"):
        tokenizer.encode_segments([Segment(C.FIM_HOLE, True)])


def test_ids_are_found_by_name():
    spec = demo_spec()
    first, last = spec["added_tokens"][3], spec["added_tokens"][-1]
    first["content"], last["content"] = last["content"], first["content"]
    assert last["content"] == C.FIM_HOLE
    assert Tokenizer(json.dumps(spec)).control_id(C.FIM_HOLE) == last["id"]


def test_only_byte_level_files_are_accepted():
    spec = demo_spec() | {"decoder": None}
    with pytest.raises(TokenizerError, match="only byte-level"):
        Tokenizer(json.dumps(spec))
