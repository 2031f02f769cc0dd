"""The kinds of request that a soak mixes, and what each may come back with."""

import http.client
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dsv4_jax.serving.client import Answer, Client, ServerError

WORDS = "the of and a to in is you that it he was for on are as with his they at be this".split()
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
    },
}
CHAT = "/v1/chat/completions"
BUSY = (429, 503)  # backpressure: not a fault
_DEEP = b"[" * 200 + b"]" * 200


class Unexpected(Exception):
    """The server did what it should not."""


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


@dataclass(frozen=True)
class Traffic:
    """Requests to one server whose context is `max_len` tokens."""

    client: Client
    max_len: int

    def one(self, rng: random.Random) -> str:
        """Sends one random request; returns its kind, "busy" if it was turned away.

        Raises:
            Unexpected: any other outcome than the kind's own.
        """
        kind: Callable[[random.Random], None] = rng.choices(
            (self.short, self.whole, self.long, self.turns, self.tools, self.leave, self.drop),
            (4, 3, 2, 2, 2, 2, 1),
        )[0]
        if rng.random() < 0.2:
            kind = self.bad
        try:
            kind(rng)
        except ServerError as error:
            if error.status in BUSY:
                return "busy"
            raise Unexpected(f"{kind.__name__}: {error.status or ''} {error}") from None
        return kind.__name__

    def short(self, rng: random.Random) -> None:
        self._ask(rng, words=rng.randint(1, 40), tokens=rng.randint(1, 24))

    def long(self, rng: random.Random) -> None:
        words = min(rng.randint(200, 800), self.max_len // 8)
        self._ask(rng, words, tokens=rng.randint(16, 64))

    def tools(self, rng: random.Random) -> None:
        self._ask(rng, words=20, tokens=32, tools=[TOOL])

    def turns(self, rng: random.Random) -> None:
        """A conversation whose later turns meet the prefix cache."""
        messages: list[dict[str, Any]] = []
        for _ in range(3):
            messages.append({"role": "user", "content": text(rng, min(60, self.max_len // 32))})
            answer = Answer()
            body = {"messages": messages, "max_tokens": 12, "thinking": {"type": "disabled"}}
            for _ in self.client.chat(answer, body):
                pass
            messages.append({"role": "assistant", "content": answer.content})

    def leave(self, rng: random.Random) -> None:
        """Hangs up after some parts of the answer."""
        body = self._body(rng, words=30, tokens=64)
        parts = self.client.chat(Answer(), body)
        for _ in zip(range(rng.randint(1, 8)), parts, strict=False):
            pass
        parts.close()

    def whole(self, rng: random.Random) -> None:
        body = json.dumps(self._body(rng, words=rng.randint(1, 60), tokens=rng.randint(1, 24)))
        status, reply = self._post(body.encode())
        if status in BUSY:
            raise ServerError("busy", status)
        if status != 200 or json.loads(reply)["usage"]["completion_tokens"] < 1:
            raise Unexpected(f"whole: status {status}: {reply[:200]!r}")

    def drop(self, rng: random.Random) -> None:
        """Hangs up without reading anything."""
        link = self._link()
        link.request("POST", CHAT, json.dumps(self._body(rng, 40, 64)), _JSON)
        link.close()

    def bad(self, rng: random.Random) -> None:
        """Sends what must be refused with a status of the 400s and an error of the right shape."""
        asked = {"messages": [{"role": "user", "content": "q"}]}
        body, kind = rng.choice(
            [
                (b"{", _JSON),
                (b"[]", _JSON),
                (_DEEP, _JSON),
                (b'{"messages": [], "temperature": NaN}', _JSON),
                (b"\xff\xfe", _JSON),
                (json.dumps(asked).encode(), {"content-type": "text/plain"}),
                *(
                    (json.dumps({**asked, **wrong}).encode(), _JSON)
                    for wrong in (
                        {"messages": []},
                        {"messages": [{"role": "wizard", "content": "q"}]},
                        {"max_tokens": -1},
                        {"max_tokens": self.max_len + 1},
                        {"temperature": "hot"},
                        {"stop": [""]},
                        {"model": "no-such-model"},
                        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
                    )
                ),
            ]
        )
        status, reply = self._post(body, kind)
        if not 400 <= status < 500 or "message" not in json.loads(reply)["error"]:
            raise Unexpected(f"bad input {body[:80]!r}: status {status}: {reply[:200]!r}")

    def _ask(self, rng: random.Random, words: int, tokens: int, **fields: Any) -> None:
        answer = Answer()
        for _ in self.client.chat(answer, self._body(rng, words, tokens, **fields)):
            pass
        if answer.finish_reason not in ("stop", "length", "tool_calls") or not answer.usage:
            raise Unexpected(f"an answer ended with {answer.finish_reason}, {answer.usage}")

    def _body(self, rng: random.Random, words: int, tokens: int, **fields: Any) -> dict[str, Any]:
        body = {
            "messages": [{"role": "user", "content": text(rng, words)}],
            "max_tokens": tokens,
            "thinking": {"type": rng.choice(("enabled", "disabled"))},
            "temperature": rng.choice((0, 0.7, 1)),
            **fields,
        }
        return body | ({"seed": rng.randint(0, 9)} if rng.random() < 0.5 else {})

    def _link(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.client.url)
        return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)

    def _post(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        link = self._link()
        try:
            link.request("POST", CHAT, body, headers or _JSON)
            reply = link.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unexpected(f"no answer: {error}") from None
        finally:
            link.close()


_JSON = {"content-type": "application/json"}
