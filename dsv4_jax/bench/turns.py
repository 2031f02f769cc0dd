"""Waiting for the first token of a long prompt: in a second turn, or after a restart."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dsv4_jax.bench.serve import Load, make_prompt

SAMPLE_CHARS = 2000  # from which the tokens of a longer text are estimated
ANSWER_TOKENS = 32


class Turn(NamedTuple):
    """What came back: seconds to the first token, the answer, tokens of the prompt."""

    first_s: float
    text: str
    prompt_tokens: int
    cached_tokens: int


def measure(
    url: str, tokens: int = 4096, repeats: int = 5, api_key: str | None = None
) -> dict[str, Any]:
    """Two turns of `repeats` different chats, whose first prompts have about `tokens` tokens.

    Returns:
        Medians of first-token seconds, `ratio` of the ratios of the chats, and their tokens.

    Raises:
        ValueError: a number is not positive, or the server refuses.
    """
    _check(tokens, repeats)
    chars = _chars(url, tokens, api_key)
    chats = [_chat(Load(url, prompt_chars=chars, api_key=api_key), i) for i in range(repeats + 1)]
    chats = chats[1:]  # the first one warms up
    return _medians(chats, "first_turn_s", "second_turn_s")


def measure_restart(
    start: Callable[[], AbstractContextManager[str]], tokens: int = 16384, repeats: int = 3
) -> dict[str, Any]:
    """The same prompts of about `tokens` tokens, asked of a server and of the next one.

    Args:
        start: Starts a server on a disk cache that all of them use; gives its URL.

    Returns:
        Medians as `measure`, of `cold_s`, `restarted_s` and the `ratio` of the second to the first.

    Raises:
        ValueError: a number is not positive, the server refuses, or answers differ.
    """
    _check(tokens, repeats)
    asked: list[list[Turn]] = []
    for _ in range(2):
        with start() as url:
            load = Load(url, prompt_chars=_chars(url, tokens, None))
            _ask(load, _first_turn(load, repeats))  # warms up
            asked.append([_ask(load, _first_turn(load, i)) for i in range(repeats)])
    both = list(zip(*asked, strict=True))
    if any(before.text != after.text for before, after in both):
        raise ValueError("the answer after a restart is another one")
    return _medians(both, "cold_s", "restarted_s")


def restart_line(figures: dict[str, Any]) -> str:
    """The figures of `measure_restart` in words."""
    return (
        f"prompt of {figures['prompt_tokens']:.0f} tokens: first token after "
        f"{figures['cold_s']:.3f} s, asked again after a restart {figures['restarted_s']:.3f} s "
        f"({figures['ratio']:.1%}); {figures['cached_share']:.1%} came from disk"
    )


def line(figures: dict[str, Any]) -> str:
    """The figures in words."""
    return (
        f"chat of {figures['prompt_tokens']:.0f} tokens: first token after "
        f"{figures['first_turn_s']:.3f} s, in the second turn after "
        f"{figures['second_turn_s']:.3f} s ({figures['ratio']:.1%}); "
        f"{figures['cached_share']:.1%} of its prompt was cached"
    )


def _check(tokens: int, repeats: int) -> None:
    if tokens < 1 or repeats < 1:
        raise ValueError(f"tokens={tokens} and repeats={repeats} must be positive")


def _medians(pairs: Sequence[Sequence[Turn]], one: str, other: str) -> dict[str, Any]:
    """Of turns and what they are compared with; `one` and `other` name the first-token seconds."""
    return {
        "prompt_tokens": statistics.median(before.prompt_tokens for before, _ in pairs),
        one: statistics.median(before.first_s for before, _ in pairs),
        other: statistics.median(after.first_s for _, after in pairs),
        "ratio": statistics.median(after.first_s / before.first_s for before, after in pairs),
        "cached_share": statistics.median(a.cached_tokens / a.prompt_tokens for _, a in pairs),
    }


def _chars(url: str, tokens: int, api_key: str | None) -> int:
    sample = make_prompt(Load(url, prompt_chars=SAMPLE_CHARS), 0)
    with _posted(url, "/tokenize", {"prompt": sample}, api_key) as reply:
        return max(tokens * SAMPLE_CHARS // json.load(reply)["count"], 1)


def _chat(load: Load, index: int) -> tuple[Turn, Turn]:
    messages = _first_turn(load, index)
    first = _ask(load, messages)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Why?"}]
    return first, _ask(load, messages)


def _first_turn(load: Load, index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": make_prompt(load, index)}]


def _ask(load: Load, messages: list[dict[str, str]]) -> Turn:
    body = {
        "messages": messages,
        "thinking": {"type": "disabled"},
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first_s, texts, usage = time.monotonic(), None, [], {}
    with _posted(load.url, "/v1/chat/completions", body, load.api_key) as reply:
        for event in _events(reply):
            if "error" in event:
                raise ValueError(f"the server ended an answer: {event['error']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text = choice["delta"].get("content")
                if choice["finish_reason"] or text:
                    first_s = first_s or time.monotonic() - start
                texts.append(text or "")
    assert first_s is not None, "a stream has an end"
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Turn(first_s, "".join(texts), usage["prompt_tokens"], cached)


def _events(reply: HTTPResponse) -> Iterator[dict[str, Any]]:
    for row in reply:
        if row.startswith(b"data: ") and not row.startswith(b"data: [DONE]"):
            yield json.loads(row[6:])


@contextmanager
def _posted(url: str, path: str, body: Any, api_key: str | None) -> Iterator[HTTPResponse]:
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    address = urlsplit(url)
    path = address.path.rstrip("/").removesuffix("/v1") + path
    with closing(HTTPConnection(address.hostname or "", address.port, timeout=600)) as connection:
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise ValueError(f"{path}: status {reply.status}: {reply.read(300).decode()}")
        yield reply
