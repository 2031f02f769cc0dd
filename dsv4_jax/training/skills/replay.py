"""Puts the questions of chats to a model that answers by itself, and plays its tools.

Every question comes with the reference's history in front of it; inside a question the model's own
calls are answered from the chat's tables until it writes an answer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dsv4_jax.training.skills import tools

MAX_ROUNDS = 6  # calls of one question
Ask = Callable[[list[dict[str, Any]], list[dict[str, Any]], bool], dict[str, Any]]


class Question(NamedTuple):
    """One question of a chat: what is sent, and the text that is right."""

    messages: list[dict[str, Any]]
    expected: str
    uses_tools: bool


class Verdict(NamedTuple):
    """exact: the answer is the expected one. formed: every call named a declared tool and its
    parameters, and an answer came; None if no tool was to be called."""

    exact: bool
    formed: bool | None


def questions(item: dict[str, Any]) -> Iterator[Question]:
    """The questions of a chat; in thinking mode without tools only the last, as only its reasoning
    was rendered for learning."""
    messages, found = item["messages"], []
    for index, message in enumerate(messages):
        if message["role"] != "user":
            continue
        turns = []
        for turn in messages[index + 1 :]:
            if turn["role"] == "user":
                break
            turns.append(turn)
        calls = any(turn.get("tool_calls") for turn in turns)
        found.append(Question(messages[: index + 1], turns[-1]["content"], calls))
    yield from found[-1:] if item.get("thinking") and not item.get("tools") else found


def judge(ask: Ask, item: dict[str, Any], question: Question) -> Verdict:
    """Lets the model answer one question of a chat."""
    declared, messages = item.get("tools", []), list(question.messages)
    formed = True
    for _ in range(MAX_ROUNDS):
        reply = ask(messages, declared, bool(item.get("thinking")))
        calls = reply.get("tool_calls") or []
        if not calls:
            exact = reply.get("content", "").strip() == question.expected
            return Verdict(exact, formed if question.uses_tools else None)
        messages.append(reply)
        for call in calls:
            formed &= is_formed(call, declared)
            messages.append(_played(call, item))
    return Verdict(False, False if question.uses_tools else None)


def is_formed(call: dict[str, Any], declared: list[dict[str, Any]]) -> bool:
    """Whether a call names a declared tool and gives exactly its required parameters."""
    arguments = _arguments(call)
    for tool in declared:
        function = tool["function"]
        if function["name"] == call["function"]["name"]:
            return arguments is not None and set(arguments) == set(
                function["parameters"]["required"]
            )
    return False


def _played(call: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    arguments = _arguments(call)
    if arguments is None:
        content = "error: the arguments are not a JSON object"
    else:
        content = tools.answer(call["function"]["name"], arguments, item.get("tables", {}))
    return {"role": "tool", "tool_call_id": call["id"], "content": content}


def _arguments(call: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads(call["function"]["arguments"])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def replay(
    ask: Ask,
    chats: Iterable[tuple[dict[str, Any], int]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Shares of exact answers and well-formed tool loops by skill, mode and length.

    chats: items with the length bucket they count in. progress: gets the number of answers so far.
    """
    sums: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    done = 0
    for item, length in chats:
        mode = "thinking" if item.get("thinking") else "direct"
        counts = sums[item["skill"], mode, length]
        for question in questions(item):
            verdict = judge(ask, item, question)
            counts[0] += 1
            counts[1] += verdict.exact
            counts[2] += verdict.formed is not None
            counts[3] += bool(verdict.formed)
            progress(done := done + 1)
    rows = []
    for (skill, mode, length), (n, exact, loops, formed) in sorted(sums.items()):
        row = {"skill": skill, "mode": mode, "length": length, "answers": n, "exact": exact / n}
        rows.append(row | ({"well formed": formed / loops} if loops else {}))
    return {"rows": rows}
