"""Sampling defaults of a checkpoint: read, checked, and used where a request says nothing."""

import json

import pytest

from dsv4_jax.serving.generation import NAME, read_generation
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.rules import Rules
from tests.serving.fakes import tokenizer


def test_what_is_read(tmp_path):
    assert read_generation(tmp_path) == {}
    raw = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 1}
    (tmp_path / NAME).write_text(json.dumps(raw))
    assert read_generation(tmp_path) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (tmp_path / NAME).write_text(json.dumps(raw | {"do_sample": False}))
    assert read_generation(tmp_path)["temperature"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"temperature": 3}', "temperature=3 must lie between 0 and 2"),
        ('{"top_p": "high"}', "top_p='high' must be a number"),
        ('{"top_k": 1.5}', "top_k=1.5 must be a count"),
    ],
)
def test_mistakes_are_named(text, message, tmp_path):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_generation(tmp_path)


def test_a_request_that_says_something_is_heard():
    planner = Planner(tokenizer(), "official", 512, Rules(sampling={"temperature": 0.25}))
    assert planner.sampling({}, 3, 4, None).temperature == 0.25
    assert planner.sampling({"temperature": 1.5}, 3, 4, None).temperature == 1.5
