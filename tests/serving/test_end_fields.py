"""When an answer may end, whose turn is earlier, and what a stream tells of its counts."""

import socket

import httpx
import numpy as np
import pytest

from dsv4_jax.serving.completion_schema import read_completion_request
from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.masks import words_of
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.rules import Rules
from dsv4_jax.serving.schema import read_chat_request
from tests.serving.fakes import (
    MODEL,
    PATIENCE_S,
    FakeModel,
    answer,
    chat_answer,
    make_service,
    tokenizer,
)
from tests.serving.live import serving
from tests.serving.test_disconnect import wait_for
from tests.serving.test_streaming import chunks

MESSAGES = [{"role": "user", "content": "q"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


def ids_in(words: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def planned(free: bool = False, **fields):
    planner = Planner(tokenizer(), "official", 4096, Rules(frees_controls=free))
    return planner.plan(read_chat_request({"messages": MESSAGES} | fields)), planner


def asked(path: str, **fields) -> dict:
    start = {"prompt": "q"} if path == PLAIN else {"messages": MESSAGES}
    return {"model": MODEL, **start, **fields}


def test_words_hold_exactly_the_ids():
    assert ids_in(words_of([0, 31, 32, 70], 71)) == {0, 31, 32, 70}
    assert words_of([], 64).tolist() == [0, 0]


@pytest.mark.parametrize("tools", [[], TOOLS])
def test_chats_draw_no_control_token_without_a_meaning(tools):
    plan, planner = planned(tools=tools)
    may, controls = ids_in(plan.allowed.words_W), planner.controls
    meant = {controls.eos, controls.think_end} | ({controls.dsml} if tools else set())
    assert may & controls.all == meant
    assert may - controls.all == set(range(tokenizer().vocab_size)) - controls.all
    free, _ = planned(free=True, tools=tools)
    assert free.allowed is None


def test_the_end_is_held_off():
    eos = tokenizer().eos_id
    plan, _ = planned(min_tokens=7, stop_token_ids=[40])
    assert plan.allowed.early == 7
    assert ids_in(plan.allowed.words_W) - ids_in(plan.allowed.early_W) == {eos, 40}
    plan, _ = planned(ignore_eos=True)
    assert eos not in ids_in(plan.allowed.words_W) and not plan.allowed.early
    ask = read_completion_request({"prompt": "q", "ignore_eos": True, "min_tokens": 2})
    assert (ask.ignore_eos, ask.min_tokens) == (True, 2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"priority": "high"}, "priority"),
        (
            {"stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
    ],
)
@pytest.mark.parametrize("read", [read_chat_request, read_completion_request])
def test_mistakes_are_named(read, fields, param):
    with pytest.raises(ApiError) as caught:
        read(asked(PLAIN) | asked(CHAT) | fields)
    assert caught.value.param == param


@pytest.mark.parametrize("field", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_a_grammar_decides_alone_when_it_ends(field):
    with pytest.raises(ApiError, match="cannot be combined"):
        planned(response_format={"type": "json_object"}, **field)


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_the_model_gets_what_was_asked(path):
    model = FakeModel(chat_answer("hello"))
    with serving(make_service(model)) as address:
        body = asked(path, priority=-3, min_tokens=2, max_tokens=50)
        assert httpx.post(address + path, json=body).status_code == 200
    given = model.streams[0].given
    assert given["priority"] == 3, "lower numbers go first"
    assert given["allowed"].early == 2


def test_an_answer_that_goes_on_counts_what_was_said():
    """A spent budget interrupts the model; the tokens before it count."""
    model = FakeModel(answer("fine", reasoning="abcdefgh"))
    thinking = {"type": "enabled", "budget_tokens": 4}
    with serving(make_service(model)) as address:
        body = asked(CHAT, thinking=thinking, min_tokens=6)
        assert httpx.post(address + CHAT, json=body).status_code == 200
    first, second = (stream.given["allowed"].early for stream in model.streams)
    done = len(model.streams[1].given["prompt_ids"]) - len(model.streams[0].given["prompt_ids"])
    assert (first, second) == (6, 6 - done) and done


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_stop_strings_count_behind_the_minimum(path):
    with serving(make_service(FakeModel(chat_answer("a.b.c.d")))) as address:
        body = asked(path, stop=".", max_tokens=50)
        body |= {"thinking": {"type": "disabled"}} if path == CHAT else {}
        texts = []
        for least in (0, 3, 4):
            choice = httpx.post(address + path, json=body | {"min_tokens": least}).json()
            choice = choice["choices"][0]
            texts.append(choice["text"] if path == PLAIN else choice["message"]["content"])
    assert texts == ["a", "a.b", "a.b.c"]


@pytest.mark.parametrize("path", [CHAT, PLAIN])
@pytest.mark.parametrize("n", [1, 2])
def test_every_chunk_tells_the_counts(path, n):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = asked(path, stream=True, n=n, max_tokens=50, stream_options=options)
    with serving(make_service(FakeModel(answer("fine")), parallel=2)) as address:
        found = chunks(httpx.post(address + path, json=body).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts) and counts[0] >= 1
    assert counts[-1] == counts[-2], "the chunk of the end counts everything, as the one before"
    assert not found[-1]["choices"]
    assert all(
        chunk["usage"]["prompt_tokens"] == found[-1]["usage"]["prompt_tokens"] for chunk in found
    )


def test_a_reader_that_stalls_is_dropped_and_nobody_else():
    """Half a megabyte waits for it; others are answered meanwhile and after."""
    service = make_service(FakeModel(answer("x" * 300)), parallel=2)
    body = asked(CHAT, stream=True, logprobs=True, top_logprobs=20)
    with serving(service, stall_timeout_s=0.2, send_buffer=4096) as address:
        url = httpx.URL(address)
        with socket.socket() as client:
            client.settimeout(PATIENCE_S)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((url.host, url.port))
            client.sendall(raw(address, body))
            assert client.recv(1) == b"H", "the answer begins"
            assert httpx.post(address + CHAT, json=asked(CHAT)).status_code == 200
            wait_for(lambda: not service._running)
            received = b"".join(iter(lambda: read(client), b""))
            assert b"[DONE]" not in received
        assert httpx.post(address + CHAT, json=asked(CHAT)).status_code == 200
    assert service.thread.admitted == 0


def raw(address: str, body: dict) -> bytes:
    request = httpx.Request("POST", address + CHAT, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    return f"POST {CHAT} HTTP/1.1\r\n{head}\r\n".encode() + request.read()


def read(client: socket.socket) -> bytes:
    try:
        return client.recv(1 << 16)
    except ConnectionError:
        return b""
