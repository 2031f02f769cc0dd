"""Answers in the shape of Anthropic messages, whole and as events."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4_jax.serving.answers import Answers
from dsv4_jax.serving.anthropic.errors import error_body
from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.events import (
    Content,
    Event,
    Finish,
    Reasoning,
    ToolArguments,
    ToolStart,
    merge,
    random_id,
)
from dsv4_jax.serving.reply import message_of

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass
class MessageReply:
    """What the parts of one answer have in common. `model` is the name the client used."""

    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: random_id("msg_"))

    def completion(self, answers: Answers) -> dict[str, Any]:
        ((events, finish),) = answers
        return self.message(_blocks(events), finish)

    def encoder(self, count: int) -> "MessageEncoder":
        assert count == 1, "there is one answer to a message"
        return MessageEncoder(self)

    def message(self, blocks: list[dict[str, Any]], finish: Finish | None) -> dict[str, Any]:
        """Returns the message; without `finish`, as it begins."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": blocks,
            **(ending(finish) if finish else {"stop_reason": None, "stop_sequence": None}),
            "usage": self.usage(finish),
        }

    def usage(self, finish: Finish | None) -> dict[str, Any]:
        """Returns token counts; cached input is not part of `input_tokens`."""
        cached = min(finish.cached_tokens, self.prompt_tokens) if finish else 0
        return {
            "input_tokens": self.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": finish.completion_tokens if finish else 0,
        }


def ending(finish: Finish) -> dict[str, Any]:
    reason = "stop_sequence" if finish.stop is not None else _REASONS[finish.reason]
    return {"stop_reason": reason, "stop_sequence": finish.stop}


def signature(thinking: str) -> str:
    """What clients send back with a thinking block; nothing depends on it."""
    return hashlib.sha256(thinking.encode()).hexdigest()


def _blocks(events: Sequence[Event]) -> list[dict[str, Any]]:
    message = message_of(events)
    blocks: list[dict[str, Any]] = []
    if text := message.get("reasoning"):
        blocks.append({"type": "thinking", "thinking": text, "signature": signature(text)})
    if message["content"]:
        blocks.append({"type": "text", "text": message["content"], "citations": None})
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = _arguments(function["arguments"])
        blocks.append(
            {"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments}
        )
    return blocks


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; {} for those of an answer that was cut off inside them."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def event(kind: str, **fields: Any) -> bytes:
    """Returns one server-sent event of the type `kind`."""
    text = json.dumps({"type": kind, **fields}, separators=(",", ":"))
    return f"event: {kind}\ndata: {text}\n\n".encode()


class MessageEncoder:
    """The items of an answer as events; content blocks are opened and closed in pairs."""

    done = b""
    beat = event("ping")

    def __init__(self, reply: MessageReply) -> None:
        self._reply = reply
        self._has_begun = False
        self._index = -1
        self._open: str | None = None  # the type of the open block
        self._thinking = ""

    def encode(self, items: Sequence[tuple[int, Event | Finish]]) -> bytes:
        sent: list[bytes] = []
        if not self._has_begun:
            self._has_begun = True
            sent += [event("message_start", message=self._reply.message([], None)), self.beat]
        own = [item for _, item in items]
        for part in merge([item for item in own if not isinstance(item, Finish)]):
            sent += self._part(part)
        if isinstance(finish := own[-1], Finish):
            sent += self._close()
            usage = self._reply.usage(finish)
            sent.append(event("message_delta", delta=ending(finish), usage=usage))
            sent.append(event("message_stop"))
        return b"".join(sent)

    def error(self, error: ApiError) -> bytes:
        body = error_body(error)
        return event("error", error=body["error"])

    def _part(self, part: Event) -> list[bytes]:
        match part:
            case Reasoning(text):
                self._thinking += text
                start = {"type": "thinking", "thinking": "", "signature": ""}
                return self._delta(start, {"type": "thinking_delta", "thinking": text})
            case Content(text):
                start = {"type": "text", "text": ""}
                return self._delta(start, {"type": "text_delta", "text": text})
            case ToolStart(_, name, call_id):
                start = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return [*self._close(), *self._begin(start)]
            case ToolArguments(_, text):
                return [self._sent({"type": "input_json_delta", "partial_json": text})]

    def _delta(self, start: dict[str, Any], delta: dict[str, Any]) -> list[bytes]:
        before = [] if self._open == start["type"] else [*self._close(), *self._begin(start)]
        return [*before, self._sent(delta)]

    def _begin(self, block: dict[str, Any]) -> list[bytes]:
        self._index += 1
        self._open = block["type"]
        return [event("content_block_start", index=self._index, content_block=block)]

    def _sent(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        signed = []
        if self._open == "thinking":
            mark = signature(self._thinking)
            signed = [self._sent({"type": "signature_delta", "signature": mark})]
        self._open = None
        return [*signed, event("content_block_stop", index=self._index)]
