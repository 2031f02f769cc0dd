"""Answers in the shape of OpenAI chat completions, whole and in chunks."""

import json
import secrets
import string
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dsv4_jax.serving.events import Content, Event, Finish, Reasoning, ToolArguments, ToolStart

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_BASE62 = string.ascii_letters + string.digits
# Some clients split lines at these too.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def random_id(prefix: str) -> str:
    return prefix + "".join(secrets.choice(_BASE62) for _ in range(24))


def server_sent(data: object) -> bytes:
    """Returns one server-sent event that carries `data` as JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"data: {text}\n\n".encode()


@dataclass
class Reply:
    """What the parts of one answer have in common. `model` is the name the client used."""

    model: str
    fingerprint: str
    prompt_tokens: int
    include_usage: bool = False
    id: str = field(default_factory=lambda: random_id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, events: Iterable[Event], finish: Finish) -> dict[str, Any]:
        """Returns the whole answer as one object."""
        message = _message(events)
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": finish.reason,
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": self.usage(finish),
        }

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, event: Event) -> dict[str, Any]:
        return self._chunk(_delta(event))

    def last_chunks(self, finish: Finish) -> list[dict[str, Any]]:
        """Returns the chunk with the reason and, if asked for, the one with the usage."""
        chunks = [self._chunk({}, finish.reason)]
        if self.include_usage:
            head = self._head("chat.completion.chunk")
            chunks.append({**head, "choices": [], "usage": self.usage(finish)})
        return chunks

    def usage(self, finish: Finish) -> dict[str, Any]:
        """Returns token counts; nothing is cached between requests yet."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": finish.completion_tokens,
            "total_tokens": self.prompt_tokens + finish.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": finish.reasoning_tokens},
            "prompt_cache_hit_tokens": 0,
            "prompt_cache_miss_tokens": self.prompt_tokens,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}


def _delta(event: Event) -> dict[str, Any]:
    match event:
        case Reasoning(text):  # clients split over the name
            return {"reasoning_content": text, "reasoning": text}
        case Content(text):
            return {"content": text}
        case ToolStart(index, name):
            return {"tool_calls": [{"index": index, **_call(name)}]}
        case ToolArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _call(name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": ""}
    return {"id": random_id("call_"), "type": "function", "function": function}


def _message(events: Iterable[Event]) -> dict[str, Any]:
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case ToolStart(_, name):
                calls.append(_call(name))
                arguments.append([])
            case ToolArguments(index, text):
                arguments[index].append(text)
    for call, pieces in zip(calls, arguments, strict=True):
        call["function"]["arguments"] = "".join(pieces)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": calls}
    if reasoning:
        message["reasoning_content"] = message["reasoning"] = "".join(reasoning)
    return message
