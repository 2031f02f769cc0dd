"""Answers in the shape of OpenAI chat completions, whole and in chunks."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.events import (
    Content,
    Event,
    Finish,
    Progress,
    Reasoning,
    ToolArguments,
    ToolStart,
    merge,
    random_id,
)
from dsv4_jax.serving.logprobs import TokenBytes, chat_logprobs

DONE = b"data: [DONE]\n\n"
REASONING_FIELDS = ("reasoning_content", "reasoning")  # clients split over the name
KEEP_ALIVE = b": keep-alive\n\n"
# Some clients split lines at these too.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def server_sent(data: object) -> bytes:
    """Returns one server-sent event that carries `data` as JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"data: {text}\n\n".encode()


@dataclass
class Reply:
    """What the parts of one answer have in common. `model` is the name the client used.

    `token_bytes` is there when logprobs were asked for; `reasoning_fields` are names of reasoning.
    """

    model: str
    fingerprint: str
    prompt_tokens: int
    include_usage: bool = False
    token_bytes: TokenBytes | None = None
    continuous_usage: bool = False
    reasoning_fields: tuple[str, ...] = REASONING_FIELDS
    id: str = field(default_factory=lambda: random_id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, answers: Sequence[tuple[Sequence[Event], Finish]]) -> dict[str, Any]:
        """Returns all answers, each with its end, as one object."""
        choices = [
            {
                "index": index,
                "message": message_of(events, self.reasoning_fields),
                "logprobs": self._logprobs(events),
                "finish_reason": finish.reason,
            }
            for index, (events, finish) in enumerate(answers)
        ]
        usage = self.usage([finish for _, finish in answers])
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def encoder(self, count: int) -> "ChunkEncoder":
        """Returns what turns the items of `count` answers into server-sent events."""
        return ChunkEncoder(self, count)

    def first_chunk(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        delta = _delta(event, self.reasoning_fields)
        return self._chunk(index, delta, logprobs=self._logprobs([event]))

    def last_chunk(self, index: int, finish: Finish) -> dict[str, Any]:
        return self._chunk(index, {}, finish.reason)

    def usage_chunk(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        head = self._head("chat.completion.chunk")
        return {**head, "choices": [], "usage": self.usage(finishes)}

    def usage(self, finishes: Sequence[Finish | Progress]) -> dict[str, Any]:
        """Returns token counts of all answers; the prompt counts once."""
        return usage_of(self.prompt_tokens, finishes)

    def _logprobs(self, events: Iterable[Event]) -> dict[str, Any] | None:
        if self.token_bytes is None:
            return None
        texts = [event for event in events if isinstance(event, Content | Reasoning)]
        content = [t for e in texts if isinstance(e, Content) for t in e.tokens]
        reasoning = [t for e in texts if isinstance(e, Reasoning) for t in e.tokens]
        return {
            "content": chat_logprobs(content, self.token_bytes),
            "refusal": None,
            "reasoning_content": chat_logprobs(reasoning, self.token_bytes),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}


def usage_of(prompt_tokens: int, finishes: Sequence[Finish | Progress]) -> dict[str, Any]:
    """Returns token counts as chat and plain completions report them."""
    completion = sum(finish.completion_tokens for finish in finishes)
    reasoning = sum(finish.reasoning_tokens for finish in finishes)
    cached = min(prompt_tokens, finishes[0].cached_tokens) if finishes else 0
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt_tokens - cached,
    }


def _delta(event: Event, reasoning_fields: tuple[str, ...]) -> dict[str, Any]:
    match event:
        case Reasoning(text):
            return dict.fromkeys(reasoning_fields, text)
        case Content(text):
            return {"content": text}
        case ToolStart(index, name, call_id):
            return {"tool_calls": [{"index": index, **_call(name, call_id)}]}
        case ToolArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _call(name: str, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def message_of(
    events: Iterable[Event], reasoning_fields: tuple[str, ...] = REASONING_FIELDS
) -> dict[str, Any]:
    """Returns an answer as a chat message."""
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
            case ToolStart(_, name, call_id):
                calls.append(_call(name, call_id))
                arguments.append([])
            case ToolArguments(index, text):
                arguments[index].append(text)
    for call, pieces in zip(calls, arguments, strict=True):
        call["function"]["arguments"] = "".join(pieces)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": calls}
    if reasoning:
        message |= dict.fromkeys(reasoning_fields, "".join(reasoning))
    return message


def taken(
    items: Sequence[tuple[int, Event | Finish | Progress]], progress: list[Finish | Progress]
) -> list[tuple[int, Event | Finish]]:
    """Notes in `progress` how far each answer is; returns the items that have more to say."""
    kept: list[tuple[int, Event | Finish]] = []
    for index, item in items:
        if isinstance(item, Finish | Progress):
            progress[index] = item
        if not isinstance(item, Progress):
            kept.append((index, item))
    return kept


class ChunkEncoder:
    """Numbered items of several answers as chunks, each answer's beginning with its role."""

    done = DONE
    beat = KEEP_ALIVE

    def __init__(self, reply: Reply, count: int) -> None:
        self._reply = reply
        self._begun: set[int] = set()
        self._finishes: list[Finish | None] = [None] * count
        self._progress: list[Finish | Progress] = [Progress(0, 0)] * count

    def encode(self, items: Sequence[tuple[int, Event | Finish | Progress]]) -> bytes:
        chunks: list[dict[str, Any]] = []
        items = taken(items, self._progress)
        for index in sorted({index for index, _ in items}):
            if index not in self._begun:
                self._begun.add(index)
                chunks.append(self._reply.first_chunk(index))
            own = [item for number, item in items if number == index]
            texts = merge([item for item in own if not isinstance(item, Finish)])
            chunks += [self._reply.chunk(index, event) for event in texts]
            if isinstance(end := own[-1], Finish):
                self._finishes[index] = end
                chunks.append(self._reply.last_chunk(index, end))
        if self._reply.continuous_usage:
            usage = self._reply.usage(self._progress)
            chunks = [{**chunk, "usage": usage} for chunk in chunks]
        ends = [finish for finish in self._finishes if finish is not None]
        if len(ends) == len(self._finishes) and self._reply.include_usage:
            chunks.append(self._reply.usage_chunk(ends))
        return b"".join(map(server_sent, chunks))

    def error(self, error: ApiError) -> bytes:
        return server_sent(error.body())
