"""From API requests to encoder messages: what a server does before it renders.

Clients disagree about the finer points of a conversation, and the published encoder renders some of
them in ways the model was not meant to see. The decisions made here:

- `developer` means system; consecutive system messages merge with a blank line.
- Request tools and reply schema go to the first system message, or to an empty one put in front.
- Tool results follow the order of the calls; results of unknown calls come last.
- A task survives when its message merges into tool results or earlier text.
- Consecutive assistant messages merge.
- A conversation that ends in a system message still asks for an answer.

The result goes to `render_segments` or `encode_messages`. Beside the published keys it may hold:

| key | on | meaning |
| --- | --- | --- |
| `blocks` | user | texts and tool results, merged and ordered |
| `extracted_url` | user | URL that a `read_url` task is about |
| `keep_reasoning` | system | as if tools were declared: earlier reasoning stays |
| `open_turn` | system | last message; the assistant's turn starts behind it |
| `open_reasoning` | assistant | the model continues this reasoning |
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.errors import EncodingError
from dsv4_jax.encoding.turns import TEXT, TOOL_RESULT, Block, order_blocks
from dsv4_jax.encoding.validate import (
    check_json,
    check_text,
    content_text,
    optional_text,
    response_schema,
    tool_call_list,
    tool_list,
)

_INTERNAL_ROLES = ("developer", "latest_reminder")


def normalize_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    show_tools: bool = True,
    response_format: Mapping[str, Any] | None = None,
    task: str | None = None,
    extracted_url: str | None = None,
    continue_final_message: bool = False,
    internal_roles: bool = False,
    require_reasoning: bool = False,
    restore_reasoning: Callable[[Sequence[str]], str | None] | None = None,
) -> list[dict[str, Any]]:
    """Encoder messages for a chat request. The input is not modified.

    Args:
        messages: OpenAI chat messages.
        tools: the request's tools; they replace tools found on messages.
        show_tools: False for `tool_choice: "none"`: tools are not rendered, reasoning still stays.
        response_format: the request's; only a `json_schema` reaches the prompt.
        task: quick-instruction task for the last message.
        extracted_url: URL for the task `read_url`.
        continue_final_message: the model continues the last (assistant) message; the same as
            `prefix: true` on that message.
        internal_roles: render `developer` as the published encoder does, admit `latest_reminder`.
        require_reasoning: refuse tool-call turns without reasoning instead of rendering none.
        restore_reasoning: finds the reasoning of a tool-call turn that lacks it, by call ids.

    Raises:
        EncodingError: with the field and an API error code.
    """
    if not messages:
        raise EncodingError("messages", "must not be empty", "invalid_message_order")
    turns = _Builder(internal_roles, restore_reasoning, require_reasoning)
    for index, message in enumerate(messages):
        turns.add(message, f"messages[{index}]")
    result = turns.finish()
    if task is not None:
        _set_task(result[-1], task, extracted_url)
    _close(result, continue_final_message, where=f"messages[{len(messages) - 1}]")
    _refuse_early_prefix(messages)
    _attach(result, tools, show_tools, response_format)
    return result


class _Builder:
    """Merges messages one by one into encoder messages."""

    def __init__(
        self,
        internal_roles: bool,
        restore_reasoning: Callable[[Sequence[str]], str | None] | None,
        require_reasoning: bool,
    ) -> None:
        self.internal_roles = internal_roles
        self.restore_reasoning = restore_reasoning
        self.require_reasoning = require_reasoning
        self.result: list[dict[str, Any]] = []
        self.call_order: dict[str | None, int] = {}

    def add(self, message: Mapping[str, Any], where: str) -> None:
        if not isinstance(message, Mapping):
            raise EncodingError(where, f"must be an object, not {type(message).__name__}")
        role = message.get("role")
        content = content_text(message.get("content"), f"{where}.content")
        if role == "developer" and not self.internal_roles:
            role = "system"
        if role == "system":
            self._system(message, content, where)
        elif role in ("user", "tool"):
            self._user(message, role, content, where)
        elif role == "assistant":
            self._assistant(message, content, where)
        elif self.internal_roles and role in _INTERNAL_ROLES:
            self._internal(message, role, content, where)
        else:
            problem = f"{role!r} is not one of system, developer, user, assistant, tool"
            raise EncodingError(f"{where}.role", problem)

    def finish(self) -> list[dict[str, Any]]:
        self._order_last()
        return self.result

    def _last(self, role: str) -> dict[str, Any] | None:
        return self.result[-1] if self.result and self.result[-1]["role"] == role else None

    def _start(self, role: str, **fields: Any) -> dict[str, Any]:
        self._order_last()
        self.result.append({"role": role, **fields})
        return self.result[-1]

    def _order_last(self) -> None:
        """Orders the tool results of a user turn once nothing can join it any more."""
        if (turn := self._last("user")) is not None:
            unknown = len(self.call_order)
            ordered = order_blocks(turn["blocks"], self.call_order, unknown)
            turn["blocks"] = [{"type": b.kind, "content": b.content} for b in ordered]

    def _system(self, message: Mapping[str, Any], content: str, where: str) -> None:
        turn = self._last("system") or self._start("system", content="")
        turn["content"] = _blank_line(turn["content"], content)
        _declare(turn, message, where)

    def _internal(self, message: Mapping[str, Any], role: str, content: str, where: str) -> None:
        if role == "developer" and not content:
            raise EncodingError(f"{where}.content", "a developer message needs text")
        _declare(self._start(role, content=content), message, where)

    def _user(self, message: Mapping[str, Any], role: str, content: str, where: str) -> None:
        is_text = role == "user"
        turn = self._last("user")
        if turn is None or (is_text and turn.get("task") is not None):
            turn = self._start("user", blocks=[])
        call_id = None if is_text else optional_text(message, "tool_call_id", where)
        turn["blocks"].append(Block(TEXT if is_text else TOOL_RESULT, content, call_id, where))
        if is_text and (task := _task(message, where)) is not None:
            turn["task"] = task

    def _assistant(self, message: Mapping[str, Any], content: str, where: str) -> None:
        calls = tool_call_list(message.get("tool_calls"), f"{where}.tool_calls")
        reasoning = self._reasoning(message, calls, where)
        turn = self._last("assistant")
        if turn is None:
            turn = self._start("assistant", content="", reasoning_content="", tool_calls=[])
        turn["content"] = _blank_line(turn["content"], content)
        turn["reasoning_content"] = _blank_line(turn["reasoning_content"], reasoning)
        turn["tool_calls"].extend(calls)
        if calls:
            self.call_order = {call["id"]: i for i, call in enumerate(turn["tool_calls"])}
            self.call_order.pop(None, None)
        if (task := _task(message, where)) is not None:
            turn["task"] = task
        if message.get("prefix"):
            turn["wo_eos"] = True

    def _reasoning(self, message: Mapping[str, Any], calls: Sequence[Any], where: str) -> str:
        for key in ("reasoning_content", "reasoning"):
            if text := optional_text(message, key, where):
                return text
        if not calls:
            return ""
        ids = [call["id"] for call in calls if call["id"]]
        restored = self.restore_reasoning(ids) if self.restore_reasoning and ids else None
        if restored is None and self.require_reasoning:
            raise EncodingError(f"{where}.reasoning_content", "is required next to tool_calls")
        return restored or ""


def _blank_line(before: str, after: str) -> str:
    return f"{before}\n\n{after}" if before and after else before or after


def _task(message: Mapping[str, Any], where: str) -> str | None:
    task = optional_text(message, "task", where)
    if task is not None and task not in C.TASK_TOKENS:
        raise EncodingError(f"{where}.task", f"{task!r} is not one of {', '.join(C.TASK_TOKENS)}")
    return task


def _declare(turn: dict[str, Any], message: Mapping[str, Any], where: str) -> None:
    """Keeps tools and reply schema that a message itself carries."""
    if message.get("tools"):
        turn.setdefault("tools", []).extend(tool_list(message["tools"], f"{where}.tools"))
    if schema := message.get("response_format"):
        turn["response_format"] = check_json(schema, f"{where}.response_format")


def _set_task(last: dict[str, Any], task: str, extracted_url: str | None) -> None:
    task = _task({"task": task}, "request") or ""
    role = "assistant" if task == "title" else "user"
    if last["role"] != role:
        problem = f"{task!r} needs a conversation that ends in a message of the role {role!r}"
        raise EncodingError("task", problem, "invalid_message_order")
    if task == "read_url":
        if not extracted_url:
            raise EncodingError("extracted_urls", "the task 'read_url' needs a URL")
        last["extracted_url"] = check_text(extracted_url, "extracted_urls")
    last["task"] = task


def _close(result: list[dict[str, Any]], continue_final: bool, where: str) -> None:
    """Makes the conversation end where an answer can start."""
    last = result[-1]
    if last["role"] == "assistant":
        if continue_final:
            last["wo_eos"] = True
        if last.get("wo_eos"):
            _continue(last, where)
        elif last.get("task") is None:
            problem = "is an assistant message: add a user message, or set `prefix` to continue it"
            raise EncodingError(where, problem, "invalid_message_order")
    elif continue_final:
        raise EncodingError(where, "only an assistant message continues", "invalid_message_order")
    elif last["role"] == "system":
        last["open_turn"] = True
    elif last["role"] == "latest_reminder":
        problem = "is a reminder: it belongs before the last user message"
        raise EncodingError(where, problem, "invalid_message_order")


def _continue(last: dict[str, Any], where: str) -> None:
    if last["tool_calls"]:
        raise EncodingError(f"{where}.tool_calls", "a turn that calls tools cannot be continued")
    if last["reasoning_content"] and not last["content"]:
        last["open_reasoning"] = True


def _refuse_early_prefix(messages: Sequence[Mapping[str, Any]]) -> None:
    for index, message in enumerate(messages[:-1]):
        if message.get("prefix"):
            problem = "`prefix` is for the last message"
            raise EncodingError(f"messages[{index}].prefix", problem, "invalid_message_order")


def _attach(
    result: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    show_tools: bool,
    response_format: Mapping[str, Any] | None,
) -> None:
    """Gives tools and reply schema to the first system message."""
    schema = response_schema(response_format)
    declared = tool_list(tools, "tools") if tools else []
    if not declared and schema is None:
        return
    if not any(turn["role"] == "system" for turn in result):
        result.insert(0, {"role": "system", "content": ""})
    system = next(turn for turn in result if turn["role"] == "system")
    if declared:
        for turn in result:
            turn.pop("tools", None)
        system |= {"tools": declared} if show_tools else {"keep_reasoning": True}
    if schema is not None:
        system["response_format"] = dict(schema)
