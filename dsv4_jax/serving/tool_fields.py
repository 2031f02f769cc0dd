"""Fields that shape the answer: tools, which of them to call, and the format of the reply."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from dsv4_jax.serving.errors import invalid, unsupported
from dsv4_jax.serving.fields import Fields

MAX_TOOLS = 128
MAX_GRAMMAR_CHARS = 1 << 16  # of a schema, regular expression or grammar

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
FORMATS = ("text", "json_object", "json_schema", "regex", "grammar")


@dataclass(frozen=True)
class ToolChoice:
    """`name` is the one tool that must be called; only with the mode "required"."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None


@dataclass(frozen=True)
class ReplyFormat:
    """What the content must be: `value` is the schema, the expression or the grammar."""

    kind: str
    value: Any = None


def read_tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    tools = fields.array("tools", MAX_TOOLS) or []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, dict) or tool.get("type") not in (None, "function"):
            raise invalid(where, 'must be an object with "type": "function"')
        function = Fields(tool, where).mapping("function")
        name = function.text("name")
        if name is None or not _TOOL_NAME.fullmatch(name):
            problem = "must be 1 to 64 letters, digits, underscores or hyphens"
            raise invalid(f"{where}.function.name", problem)
        function.text("description")
        function.mapping("parameters")
        function.boolean("strict")
    return tuple(tools)


def read_tool_choice(fields: Fields) -> ToolChoice:
    choice = fields.values.get("tool_choice")
    if isinstance(choice, dict):
        return _named(fields.mapping("tool_choice"))
    match fields.text("tool_choice", ("none", "auto", "required")):
        case "none":
            return ToolChoice("none")
        case "required":
            return ToolChoice("required")
    return ToolChoice()


def _named(choice: Fields) -> ToolChoice:
    if choice.text("type") != "function":
        raise unsupported("tool_choice.type", "only function is supported")
    name = choice.mapping("function").text("name")
    if name is None:
        raise invalid("tool_choice.function.name", "is required")
    return ToolChoice("required", name)


def read_reply_format(fields: Fields) -> ReplyFormat | None:
    """Returns the constraint of the content, None for plain text."""
    asked = fields.mapping("response_format")
    if fields.values.get("response_format") is None:
        return None
    kind = asked.text("type", FORMATS)
    texts = {name: asked.text(name) for name in ("regex", "grammar")}
    schema = _schema(asked)
    for name, text in texts.items():
        if text is not None and len(text) > MAX_GRAMMAR_CHARS:
            raise invalid(asked.where(name), f"must not exceed {MAX_GRAMMAR_CHARS} characters")
    match kind:
        case None:
            raise invalid("response_format.type", f"is required: {', '.join(FORMATS)}")
        case "text":
            return None
        case "json_object":
            return ReplyFormat(kind, {"type": "object"})
        case "json_schema":
            if schema is None:
                problem = "is required"
                raise invalid("response_format.json_schema.schema", problem, "invalid_schema")
            return ReplyFormat(kind, schema)
    if not texts[kind]:
        raise invalid(asked.where(kind), "must not be empty")
    return ReplyFormat(kind, texts[kind])


def _schema(asked: Fields) -> dict[str, Any] | None:
    holder = asked.mapping("json_schema")
    holder.text("name")
    holder.boolean("strict")
    schema = holder.mapping("schema")
    return None if holder.values.get("schema") is None else dict(schema.values)
