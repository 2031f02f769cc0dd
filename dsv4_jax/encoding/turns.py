"""From messages to turns: tool results and user texts become blocks of one user turn."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4_jax.encoding.errors import EncodingError

TEXT, TOOL_RESULT = "text", "tool_result"


@dataclass(frozen=True)
class Block:
    """Part of a user turn; `content` is a string or, for a tool result, whatever came in."""

    kind: str
    content: Any
    call_id: Any = ""
    where: str = ""


@dataclass
class Turn:
    """One rendered unit. `fields` are the message's own; user turns keep only what they render."""

    where: str
    role: Any
    fields: Mapping[str, Any]
    blocks: list[Block] = field(default_factory=list)

    @property
    def task(self) -> Any:
        return self.fields.get("task")

    @property
    def is_merged(self) -> bool:
        """Whether the blocks came merged and ordered (from `normalize_messages`)."""
        return "blocks" in self.fields


def merge_turns(messages: Sequence[Mapping[str, Any]], label: str = "messages") -> list[Turn]:
    """Merges adjacent tool and user messages.

    A text does not join a turn that carries a task, a tool result does. The task of a text that
    joins another turn is lost; `normalize_messages` keeps it.
    """
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        where = f"{label}[{index}]"
        if not isinstance(message, Mapping):
            raise EncodingError(where, f"must be an object, not {type(message).__name__}")
        role = message.get("role")
        if role == "user" and "blocks" in message:
            turns.append(Turn(where, role, message, [_as_block(b) for b in message["blocks"]]))
        elif role in ("user", "tool"):
            _join_user(turns, message, where)
        else:
            turns.append(Turn(where, role, message))
    return turns


def order_tool_results(turns: Sequence[Turn]) -> None:
    """Puts the results of each user turn, in place, into the order of the calls before it.

    Only result blocks move; texts keep their places. A result with an unknown id sorts with the
    first call, as in the published encoder.
    """
    call_order: dict[Any, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.fields.get("tool_calls"):
            call_order = _call_order(turn)
        elif turn.role == "user" and call_order and not turn.is_merged:
            turn.blocks = order_blocks(turn.blocks, call_order, unknown=0)


def order_blocks(blocks: Sequence[Block], call_order: Mapping[Any, int], unknown: int) -> list:
    """Sorts result blocks by `call_order` among the places they hold; unknown ids get `unknown`."""
    results = (block for block in blocks if block.kind == TOOL_RESULT)
    ordered = iter(sorted(results, key=lambda block: call_order.get(block.call_id, unknown)))
    return [next(ordered) if block.kind == TOOL_RESULT else block for block in blocks]


def last_user_index(turns: Sequence[Turn]) -> int:
    """Index of the last user or developer turn, -1 without one."""
    for index in range(len(turns) - 1, -1, -1):
        if turns[index].role in ("user", "developer"):
            return index
    return -1


def drop_old_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Removes developer (and unknown) turns that precede the last user turn.

    The reasoning of assistant turns before it is left out later, while rendering.
    """
    last = last_user_index(turns)
    kept_roles = ("user", "system", "assistant", "tool", "latest_reminder", "direct_search_results")
    return [turn for i, turn in enumerate(turns) if i >= last or turn.role in kept_roles]


def _join_user(turns: list[Turn], message: Mapping[str, Any], where: str) -> None:
    is_text = message["role"] == "user"
    kind = TEXT if is_text else TOOL_RESULT
    content = message.get("content", "")
    if is_text and not isinstance(content, str):
        raise EncodingError(f"{where}.content", f"must be text, not {type(content).__name__}")
    call_id = _checked_id(message.get("tool_call_id", ""), f"{where}.tool_call_id")
    block = Block(kind, content, call_id, where)
    previous = turns[-1] if turns and turns[-1].role == "user" else None
    if previous is not None and not (is_text and previous.task is not None):
        previous.blocks.append(block)
        return
    fields = {"task": message["task"]} if is_text and "task" in message else {}
    turns.append(Turn(where, "user", fields, [block]))


def _as_block(block: Mapping[str, Any]) -> Block:
    return Block(block["type"], block["content"])


def _call_order(turn: Turn) -> dict[Any, int]:
    order = {}
    for index, call in enumerate(turn.fields["tool_calls"]):
        where = f"{turn.where}.tool_calls[{index}]"
        if not isinstance(call, Mapping):
            raise EncodingError(where, "must be an object")
        function = call.get("function", {})
        call_id = call.get("id") or (function.get("id") if isinstance(function, Mapping) else None)
        if call_id:
            order[_checked_id(call_id, f"{where}.id")] = index
    return order


def _checked_id(call_id: Any, where: str) -> Any:
    if not isinstance(call_id, Hashable):
        raise EncodingError(where, f"must be a string, not {type(call_id).__name__}")
    return call_id
