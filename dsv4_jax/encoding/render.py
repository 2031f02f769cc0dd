"""The published prompt encoder: messages in, prompt text or prompt segments out.

Both functions render what the V4 release's own encoder renders, to the byte, with its defaults and
its oddities; `normalize_messages` is the place where a server repairs conversations beforehand.
Messages are OpenAI-shaped dicts with two extra roles (`developer`, `latest_reminder`) and these
extra keys: `tools` and `response_format` (system, developer), `task` (any), `wo_eos` (assistant).
Keys that only `normalize_messages` writes are listed in its module.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.dsml import write_response_format, write_tool_calls, write_tools
from dsv4_jax.encoding.errors import EncodingError
from dsv4_jax.encoding.profiles import Profile, effort_text
from dsv4_jax.encoding.segments import Segment, SegmentWriter, join_segments
from dsv4_jax.encoding.turns import (
    TEXT,
    Block,
    Turn,
    drop_old_turns,
    last_user_index,
    merge_turns,
    order_tool_results,
)

ThinkingMode = Literal["thinking", "chat"]
Messages = Sequence[Mapping[str, Any]]


def encode_messages(
    messages: Messages,
    thinking_mode: ThinkingMode = "thinking",
    context: Messages | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
    *,
    profile: Profile = "preview",
) -> str:
    """The prompt for `messages` as one string.

    Args:
        messages: the conversation, or its new part when `context` is given. Never modified.
        thinking_mode: "thinking" leaves the prompt inside reasoning, "chat" behind it.
        context: messages that an earlier prompt already contains; they decide what the new part
            looks like but are not rendered, and no BOS is written.
        drop_thinking: leave out reasoning (and developer messages) from before the last user
            message. Has no effect once any message declares tools.
        add_default_bos_token: start with BOS.
        reasoning_effort: None, "high" or "max" ("low" too in the official profile); what a client
            asks for goes through `resolve_effort` first. Ignored in chat mode.
        profile: which release's effort texts to use.

    Raises:
        EncodingError: naming the message and field that cannot be rendered.
    """
    return join_segments(
        render_segments(
            messages,
            thinking_mode,
            context,
            drop_thinking,
            add_default_bos_token,
            reasoning_effort,
            profile=profile,
        )
    )


def render_segments(
    messages: Messages,
    thinking_mode: ThinkingMode = "thinking",
    context: Messages | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
    *,
    profile: Profile = "preview",
) -> list[Segment]:
    """As `encode_messages`, but in segments for `Tokenizer.encode_segments`."""
    if thinking_mode not in ("thinking", "chat"):
        raise EncodingError("thinking_mode", f"{thinking_mode!r} must be 'thinking' or 'chat'")
    effort = effort_text(reasoning_effort, profile)
    thinking = thinking_mode == "thinking"
    old = merge_turns(context or [], "context")
    turns = old + merge_turns(messages)
    order_tool_results(turns)
    drop = drop_thinking and not any(_keeps_reasoning(turn) for turn in turns)
    if thinking and drop:
        # The published count: a developer turn that ends the context and is dropped from the whole
        # is still counted here, so the first new turn goes unrendered.
        turns, first = drop_old_turns(turns), len(drop_old_turns(old))
    else:
        first = len(old)

    writer = SegmentWriter()
    if add_default_bos_token and not old:
        writer.control(C.BOS)
    if thinking and first == 0 and turns:
        writer.text(effort)
    renderer = _Renderer(writer, turns, thinking, drop)
    for index in range(first, len(turns)):
        renderer.turn(index)
    return writer.segments()


def _keeps_reasoning(turn: Turn) -> bool:
    return bool(turn.fields.get("tools") or turn.fields.get("keep_reasoning"))


class _Renderer:
    """Writes single turns, each knowing its neighbours."""

    def __init__(
        self, writer: SegmentWriter, turns: Sequence[Turn], thinking: bool, drop: bool
    ) -> None:
        self.writer = writer
        self.turns = turns
        self.thinking = thinking
        self.drop = drop
        self.last_user = last_user_index(turns)

    def turn(self, index: int) -> None:
        turn = self.turns[index]
        match turn.role:
            case "system":
                self.writer.text(f"{turn.fields.get('content') or ''}")
                self._declarations(turn)
            case "developer":
                self._developer(turn)
            case "user":
                self._user(turn)
            case "latest_reminder":
                self.writer.control(C.LATEST_REMINDER)
                self.writer.text(f"{turn.fields.get('content')}")
            case "assistant":
                self._assistant(index)
            case _:
                raise EncodingError(f"{turn.where}.role", f"unknown role {turn.role!r}")
        self._transition(index)

    def _declarations(self, turn: Turn) -> None:
        if tools := turn.fields.get("tools"):
            self.writer.text("\n\n")
            write_tools(self.writer, tools, turn.where)
        if schema := turn.fields.get("response_format"):
            self.writer.text("\n\n")
            write_response_format(self.writer, schema, turn.where)

    def _developer(self, turn: Turn) -> None:
        content = turn.fields.get("content")
        if not isinstance(content, str) or not content:
            raise EncodingError(f"{turn.where}.content", "a developer message needs text")
        self.writer.control(C.USER)
        self.writer.text(content)
        self._declarations(turn)

    def _user(self, turn: Turn) -> None:
        self.writer.control(C.USER)
        for position, block in enumerate(turn.blocks):
            self.writer.text("\n\n" if position else "")
            if block.kind == TEXT:
                self.writer.text(block.content)
            else:
                self.writer.text(C.TOOL_RESULT_OPEN + _result_text(block) + C.TOOL_RESULT_CLOSE)
        if url := turn.fields.get("extracted_url"):
            self.writer.control(C.EXTRACTED_URL)
            self.writer.text(url)

    def _assistant(self, index: int) -> None:
        turn, fields = self.turns[index], self.turns[index].fields
        answers_task = index > 0 and self.turns[index - 1].task is not None
        current = not self.drop or index > self.last_user
        if self.thinking and current and not answers_task:
            self.writer.text(f"{fields.get('reasoning_content') or ''}")
            if fields.get("open_reasoning"):
                return
            self.writer.control(C.THINK_END)
        self.writer.text(f"{fields.get('content') or ''}")
        if calls := fields.get("tool_calls"):
            self.writer.text("\n\n")
            write_tool_calls(self.writer, calls, turn.where)
        if not fields.get("wo_eos"):
            self.writer.control(C.EOS)

    def _transition(self, index: int) -> None:
        """What follows a turn: nothing, a task token, or the start of the assistant's turn."""
        turn = self.turns[index]
        following = self.turns[index + 1].role if index + 1 < len(self.turns) else "assistant"
        if following not in ("assistant", "latest_reminder"):
            return
        if turn.task is not None:
            self._task(turn)
        elif turn.role in ("user", "developer") or turn.fields.get("open_turn"):
            opens = self.thinking and (not self.drop or index >= self.last_user)
            self._assistant_start(opens)

    def _task(self, turn: Turn) -> None:
        if not isinstance(turn.task, str) or turn.task not in C.TASK_TOKENS:
            names = ", ".join(C.TASK_TOKENS)
            raise EncodingError(f"{turn.where}.task", f"{turn.task!r} is not one of {names}")
        if turn.task == "action":
            self._assistant_start(self.thinking)
        self.writer.control(C.TASK_TOKENS[turn.task])

    def _assistant_start(self, opens_reasoning: bool) -> None:
        self.writer.control(C.ASSISTANT)
        self.writer.control(C.THINK_START if opens_reasoning else C.THINK_END)


def _result_text(block: Block) -> str:
    if not isinstance(block.content, list):
        return f"{block.content}"
    texts = []
    for index, part in enumerate(block.content):
        where = f"{block.where}.content[{index}]"
        if not isinstance(part, Mapping):
            raise EncodingError(where, "must be an object with a `type`")
        text = part.get("text", "")
        if part.get("type") != "text":
            text = f"[Unsupported {part.get('type')}]"
        elif not isinstance(text, str):
            raise EncodingError(f"{where}.text", f"must be text, not {type(text).__name__}")
        texts.append(text)
    return "\n\n".join(texts)
