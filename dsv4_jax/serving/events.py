"""What an answer consists of while it is generated."""

import secrets
import string
from dataclasses import dataclass, field

from dsv4_jax.serving.model import Token

_BASE62 = string.ascii_letters + string.digits


def random_id(prefix: str) -> str:
    return prefix + "".join(secrets.choice(_BASE62) for _ in range(24))


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the reasoning text, with its tokens if their logprobs were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer text, with its tokens if their logprobs were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A tool call begins; `index` counts the calls of one answer from 0.

    `call_id` is what the client will send back with the result.
    """

    index: int
    name: str
    call_id: str = field(default_factory=lambda: random_id("call_"), compare=False)


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A piece of the JSON object that call `index` passes."""

    index: int
    text: str


Event = Reasoning | Content | ToolStart | ToolArguments


@dataclass(frozen=True, slots=True)
class Finish:
    """The last thing of every answer.

    `reason` is "stop", "length" or "tool_calls". `completion_tokens` counts every sampled token:
    reasoning, markup and the end token included. `cached_tokens` of the prompt were not computed
    again. `stop` is the stop string that ended the answer.
    """

    reason: str
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int = 0
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How many tokens an answer has so far, for readers who want to know; as in `Finish`."""

    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int = 0


def merge(events: list[Event]) -> list[Event]:
    """Joins neighbouring pieces of the same text, so a slow reader gets fewer, larger ones."""
    merged: list[Event] = []
    for event in events:
        before = merged[-1] if merged else None
        match before, event:
            case (Reasoning(a, s), Reasoning(b, t)):
                merged[-1] = Reasoning(a + b, s + t)
            case (Content(a, s), Content(b, t)):
                merged[-1] = Content(a + b, s + t)
            case (ToolArguments(i, a), ToolArguments(j, b)) if i == j:
                merged[-1] = ToolArguments(i, a + b)
            case _:
                merged.append(event)
    return merged
