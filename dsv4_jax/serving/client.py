"""A small client of the chat API, with nothing but the standard library."""

import http.client
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["reasoning", "content", "call", "arguments"]
POLL_S = 0.5


class ServerError(Exception):
    """What the server said was wrong. `status` is None if it broke off or never answered."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Answer:
    """One answer as far as it has come. Times are seconds since it was asked for.

    `warning` is what the server remarks about the request.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    warning: str | None = None
    first_s: float | None = None
    total_s: float = 0.0

    def message(self) -> dict[str, Any]:
        """Returns what goes back into the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    def take(self, chunk: dict[str, Any]) -> list[tuple[Kind, str]]:
        """Adds a chunk and returns its news; a "call" is a tool's name.

        Raises:
            ServerError: the chunk is an error.
        """
        if "error" in chunk:
            raise ServerError(chunk["error"]["message"])
        self.usage = chunk.get("usage") or self.usage
        if not chunk["choices"]:
            return []
        choice = chunk["choices"][0]
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        delta, news = choice["delta"], list[tuple[Kind, str]]()
        if text := delta.get("reasoning_content") or delta.get("reasoning"):
            self.reasoning += text
            news.append(("reasoning", text))
        if text := delta.get("content"):
            self.content += text
            news.append(("content", text))
        for call in delta.get("tool_calls", ()):
            news.append(self._take_call(call))
        return news

    def _take_call(self, call: dict[str, Any]) -> tuple[Kind, str]:
        if "id" in call:
            function = {"name": call["function"]["name"], "arguments": ""}
            self.calls.append({"id": call["id"], "type": "function", "function": function})
            return "call", function["name"]
        text = call["function"]["arguments"]
        self.calls[call["index"]]["function"]["arguments"] += text
        return "arguments", text


class Client:
    """Talks to one server.

    Raises:
        ValueError: `url` is not an http or https address.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {url!r} must look like http://127.0.0.1:8000")
        self.url, self._parts, self._timeout_s = url, parts, timeout_s
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def wait_ready(self, report: Callable[[str], None]) -> None:
        """Returns when requests are let in; `report` gets each new phase.

        Raises:
            ServerError: nothing answers there.
        """
        shown = None
        while (state := self._json("GET", "/ready", allowed=(200, 503)))["phase"] != "ready":
            if (now := f"{state['phase']} {state['percent']} %") != shown:
                report(shown := now)
            time.sleep(POLL_S)

    def model(self) -> dict[str, Any]:
        """Returns the entry of the first model, with `id` and `max_model_len`."""
        return self._json("GET", "/v1/models")["data"][0]

    def metrics(self) -> str:
        with self._ask("GET", "/metrics", None, (200,)) as reply:
            return reply.read().decode()

    def chat(self, answer: Answer, body: dict[str, Any]) -> Generator[tuple[Kind, str]]:
        """Asks for a streamed answer, fills `answer` and yields its parts as they come.

        Closing the iterator hangs up, and the server stops generating.

        Raises:
            ServerError: the request was refused, or the answer broke off.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        start = time.monotonic()
        try:
            with self._ask("POST", "/v1/chat/completions", body, (200,)) as reply:
                answer.warning = reply.getheader("x-dsv4-warning")
                for chunk in _events(reply):
                    for news in answer.take(chunk):
                        if answer.first_s is None:
                            answer.first_s = time.monotonic() - start
                        yield news
        finally:
            answer.total_s = time.monotonic() - start

    def _json(self, method: str, path: str, allowed: tuple[int, ...] = (200,)) -> dict[str, Any]:
        with self._ask(method, path, None, allowed) as reply:
            return json.loads(reply.read())

    @contextmanager
    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, allowed: tuple[int, ...]
    ) -> Iterator[http.client.HTTPResponse]:
        https = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        link = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout_s)
        headers = {**self._headers, "content-type": "application/json"}
        try:
            sent = None if body is None else json.dumps(body).encode()
            link.request(method, self._parts.path.rstrip("/") + path, sent, headers)
            with link.getresponse() as reply:  # it may keep the socket when the link is closed
                if reply.status not in allowed:
                    raise ServerError(_problem(reply), reply.status)
                yield reply
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerError(f"no connection to {self.url}: {reason}") from None
        finally:
            link.close()


def _problem(reply: http.client.HTTPResponse) -> str:
    text = reply.read(100_000).decode("utf-8", "replace")
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"status {reply.status}: {text[:200]}"


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in reply:
        text = line.decode().strip()
        if text == "data: [DONE]":
            return
        if text.startswith("data: "):
            yield json.loads(text[6:])
    raise ServerError("the answer broke off")
