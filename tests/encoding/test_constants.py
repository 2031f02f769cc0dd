"""The protocol's texts, to the byte."""

import hashlib

import pytest

from dsv4_jax.encoding import constants as C

OFFICIAL_IDS = {
    C.BOS: 0,
    C.EOS: 1,
    C.PAD: 2,
    C.FIM_HOLE: 128800,
    C.FIM_BEGIN: 128801,
    C.FIM_END: 128802,
    C.USER: 128803,
    C.ASSISTANT: 128804,
    C.THINK_START: 128821,
    C.THINK_END: 128822,
    C.DSML: 128825,
    C.LATEST_REMINDER: 128828,
    C.TASK_TOKENS["action"]: 128829,
    C.TASK_TOKENS["query"]: 128830,
    C.TASK_TOKENS["authority"]: 128831,
    C.TASK_TOKENS["domain"]: 128832,
    C.TASK_TOKENS["title"]: 128836,
    C.EXTRACTED_URL: 128844,
    C.TASK_TOKENS["read_url"]: 128845,
}

SIZES = {  # characters, bytes, tokens of the official tokenizer
    "EFFORT_ABSOLUTE": (476, 476, 79),
    "EFFORT_BEYOND": (526, 528, 92),
    "TOOLS_HEAD": (854, 890, 203),
    "TOOLS_TAIL": (99, 99, 19),
    "RESPONSE_FORMAT_HEAD": (80, 80, 15),
}


@pytest.mark.parametrize("name", SIZES)
def test_texts_are_unchanged(name):
    text = getattr(C, name)
    assert hashlib.sha256(text.encode()).hexdigest() == C.SHA256[name]
    assert (len(text), len(text.encode())) == SIZES[name][:2]


@pytest.mark.parametrize("name", SIZES)
def test_texts_have_the_published_token_counts(name, official):
    assert len(official.encode_text(getattr(C, name), "control")) == SIZES[name][2]


def test_control_tokens_have_the_official_ids(official):
    assert {token: official.control_id(token) for token in C.CONTROL_TOKENS} == OFFICIAL_IDS
    assert list(OFFICIAL_IDS.values()) == sorted(OFFICIAL_IDS.values())


def test_official_file_is_the_published_one(official):
    assert official.is_official
    assert official.vocab_size == 129_280
