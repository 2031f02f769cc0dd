"""What an answer consists of while it is generated."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the reasoning text."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A tool call begins; `index` counts the calls of one answer from 0."""

    index: int
    name: str


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
    reasoning, markup and the end token included.
    """

    reason: str
    completion_tokens: int
    reasoning_tokens: int


def merge(events: list[Event]) -> list[Event]:
    """Joins neighbouring pieces of the same text, so a slow reader gets fewer, larger ones."""
    merged: list[Event] = []
    for event in events:
        before = merged[-1] if merged else None
        match before, event:
            case (Reasoning(a), Reasoning(b)):
                merged[-1] = Reasoning(a + b)
            case (Content(a), Content(b)):
                merged[-1] = Content(a + b)
            case (ToolArguments(i, a), ToolArguments(j, b)) if i == j:
                merged[-1] = ToolArguments(i, a + b)
            case _:
                merged.append(event)
    return merged
