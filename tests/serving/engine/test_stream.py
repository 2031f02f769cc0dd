"""The way from the engine to a reader."""

import numpy as np
import pytest

from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine import stream
from dsv4_jax.serving.engine.loop import EngineError
from dsv4_jax.serving.engine.request import FinishReason, Request
from dsv4_jax.serving.engine.stream import HAND_OUT_S, Payload, RequestStream
from dsv4_jax.serving.model import Token


def open_stream() -> tuple[Payload, RequestStream]:
    payload = Payload(SamplingParams(9), None, np.zeros(2, np.uint32))
    return payload, RequestStream(Request("r", [1], 9, payload=payload), payload)


def test_the_first_token_comes_at_once_and_later_ones_together():
    payload, reader = open_stream()
    woken = []
    for i, now_s in enumerate([5.0, 5.0 + HAND_OUT_S / 2, 5.0 + 0.9 * HAND_OUT_S, 6.0, 6.001]):
        payload.ready.append(Token(i))
        if payload.hand_out(now_s):
            woken.append(i)
    assert woken == [0, 3]
    assert payload.out.qsize() == 2 and payload.ready == [Token(4)]
    payload.end(FinishReason.STOP)
    assert [token.id for token in reader] == [0, 1, 2, 3, 4]


def test_tokens_come_before_the_error_that_ended_them():
    payload, reader = open_stream()
    payload.ready.append(Token(3))
    payload.end(FinishReason.ERROR)
    assert next(reader).id == 3
    with pytest.raises(EngineError):
        next(reader)


def test_log_probabilities_count_as_unread(monkeypatch):
    monkeypatch.setattr(stream, "MAX_UNREAD", 8)
    payload, reader = open_stream()
    payload.ready += [Token(1, -1.0, ((1, -1.0), (2, -2.0))), Token(2)]
    payload.hand_out(0.0)
    assert payload.given == 4 and not payload.is_behind
    payload.ready += [Token(0)] * 5
    payload.hand_out(1.0)
    assert payload.is_behind
    next(reader)
    assert not payload.is_behind


def test_who_does_not_read_does_not_fill_the_memory(engine, monkeypatch):
    monkeypatch.setattr(stream, "MAX_UNREAD", 20)
    slow = engine.stream([5, 7], SamplingParams(500, seed=1), frozenset())
    other = engine.stream([6, 7], SamplingParams(60, seed=2), frozenset())
    assert len(list(other)) == 60  # who reads is not behind
    while slow.request.finish_reason is None:
        engine._thread.join(0.01)
    assert slow.request.num_generated < 500
    with pytest.raises(EngineError) as caught:
        list(slow)
    assert "more slowly" in str(caught.value.__cause__)
