"""From a messages request of the Anthropic shape to a chat request.

The result is the body of a chat request, so everything is checked and decided in one place.
"""

from collections.abc import Iterator
from typing import Any

from dsv4_jax.serving.errors import ApiError, invalid, unsupported
from dsv4_jax.serving.fields import Fields, check_known
from dsv4_jax.serving.sampling_fields import ANY_COUNT, MAX_USER_BYTES, read_stop
from dsv4_jax.serving.schema import ChatRequest, read_chat_request
from dsv4_jax.serving.tool_fields import MAX_TOOLS

EFFORTS = ("low", "medium", "high", "xhigh", "max")
_KNOWN = {
    *("model", "messages", "system", "max_tokens", "temperature", "top_p", "top_k", "stream"),
    *("stop_sequences", "metadata", "thinking", "output_config", "output_format", "tools"),
    *("tool_choice", "cache_control", "service_tier"),
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_messages_request(
    body: object, needs_limit: bool = True, refuses_unknown: bool = False
) -> ChatRequest:
    """Reads the JSON body of a messages request.

    Args:
        needs_limit: `max_tokens` must be there.
        refuses_unknown: fields that mean nothing here are an error.

    Raises:
        ApiError: 400, naming the field that is wrong or not supported.
    """
    if not isinstance(body, dict):
        raise invalid(None, "The request body must be a JSON object.", "invalid_json")
    fields = Fields(body)
    check_known(body, _KNOWN, refuses_unknown)
    limit = fields.integer("max_tokens", 1, ANY_COUNT)
    if limit is None and needs_limit:
        raise invalid("max_tokens", "is required")
    chat: dict[str, Any] = {
        "model": fields.text("model"),
        "messages": list(_messages(fields)),
        "max_tokens": limit,
        "temperature": fields.number("temperature", 0, 1),
        "top_p": fields.number("top_p", 0, 1, low_is_out=True),
        "top_k": fields.integer("top_k", 0, 2**31 - 1),
        "stop": list(read_stop(fields, "stop_sequences")),
        "stream": fields.boolean("stream"),
        "user_id": _user(fields),
        **_thinking(fields),
        **_tools(fields),
        **_format(fields),
    }
    return read_chat_request({key: value for key, value in chat.items() if value is not None})


def _user(fields: Fields) -> str | None:
    user = fields.mapping("metadata").text("user_id")
    if user is not None and len(user.encode("utf-8", "replace")) > MAX_USER_BYTES:
        raise invalid("metadata.user_id", f"must not exceed {MAX_USER_BYTES} bytes")
    return user


def _thinking(fields: Fields) -> dict[str, Any]:
    thinking = fields.mapping("thinking")
    kind = thinking.text("type", ("enabled", "disabled", "adaptive"))
    if kind is None and fields.values.get("thinking") is not None:
        raise invalid("thinking.type", "is required: enabled, disabled or adaptive")
    budget = thinking.integer("budget_tokens", 1, ANY_COUNT)
    effort = fields.mapping("output_config").text("effort", EFFORTS)
    is_on = kind in ("enabled", "adaptive")
    asked: dict[str, Any] = {"type": "enabled" if is_on else "disabled"}
    if is_on:
        asked["budget_tokens"] = budget
    return {"thinking": asked, "reasoning_effort": effort if is_on else None}


def _tools(fields: Fields) -> dict[str, Any]:
    tools = []
    for index, tool in enumerate(fields.array("tools", MAX_TOOLS) or []):
        where = f"tools[{index}]"
        if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
            raise unsupported(where, "only tools with a name and an input_schema are supported")
        given = Fields(tool, where)
        schema = given.mapping("input_schema")
        if tool.get("input_schema") is None:
            raise invalid(schema.path, "is required")
        function = {
            "name": given.text("name"),
            "description": given.text("description"),
            "parameters": dict(schema.values),
            "strict": given.boolean("strict"),
        }
        kept = {key: value for key, value in function.items() if value is not None}
        tools.append({"type": "function", "function": kept})
    choice = fields.mapping("tool_choice")
    kind = choice.text("type", (*_CHOICES, "tool"))
    if kind is None and fields.values.get("tool_choice") is not None:
        raise invalid("tool_choice.type", "is required: auto, any, tool or none")
    named = {"type": "function", "function": {"name": choice.text("name")}}
    return {
        "tools": tools or None,
        "tool_choice": named if kind == "tool" else _CHOICES.get(kind or "auto"),
        "parallel_tool_calls": not choice.boolean("disable_parallel_tool_use"),
    }


def _format(fields: Fields) -> dict[str, Any]:
    """The reply's JSON schema, under either of the two names clients use."""
    holders = ((fields.mapping("output_config"), "format"), (fields, "output_format"))
    schemas = [
        _schema(holder.mapping(name))
        for holder, name in holders
        if holder.values.get(name) is not None
    ]
    if not schemas:
        return {}
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schemas[0]}}}


def _schema(asked: Fields) -> dict[str, Any]:
    if asked.text("type", ("json_schema",)) is None:
        raise invalid(asked.where("type"), "is required: json_schema")
    schema = asked.mapping("schema")
    if asked.values.get("schema") is None:
        raise invalid(schema.path, "is required")
    return dict(schema.values)


# Messages


def _messages(fields: Fields) -> Iterator[dict[str, Any]]:
    if system := _system(fields):
        yield {"role": "system", "content": system}
    messages = fields.array("messages", ANY_COUNT)
    if messages is None:
        raise invalid("messages", "is required")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise invalid(where, "must be an object")
        role = Fields(message, where).text("role", ("user", "assistant", "system"))
        blocks = list(_blocks(message.get("content"), f"{where}.content"))
        if role == "assistant":
            yield _assistant(blocks, is_last=index == len(messages) - 1)
        elif role == "user":
            yield from _user_turn(blocks)
        elif role == "system":
            yield {"role": "system", "content": _text(blocks)}
        else:
            raise invalid(f"{where}.role", "is required: user or assistant")


def _system(fields: Fields) -> str:
    value = fields.values.get("system")
    return "" if value is None else _text(list(_blocks(value, "system")))


def _blocks(content: Any, where: str) -> Iterator[Fields]:
    """Yields the blocks of a content, a string being one block of text."""
    if isinstance(content, str):
        yield Fields({"type": "text", "text": content}, where)
        return
    if not isinstance(content, list):
        raise invalid(where, "must be text or a list of blocks")
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise invalid(f"{where}[{index}]", "must be an object")
        yield Fields(block, f"{where}[{index}]")


def _refused(block: Fields) -> ApiError:
    kind = ascii(block.values.get("type"))[:60]
    problem = f"blocks of the type {kind} are not supported here"
    return invalid(block.path, problem, "unsupported_content_type")


def _text(blocks: list[Fields]) -> str:
    for block in blocks:
        if block.values.get("type") != "text":
            raise _refused(block)
    return "\n\n".join(_needed(block, "text") for block in blocks)


def _needed(block: Fields, name: str) -> str:
    if (text := block.text(name)) is None:
        raise invalid(block.where(name), "is required")
    return text


def _user_turn(blocks: list[Fields]) -> Iterator[dict[str, Any]]:
    if not blocks:
        yield {"role": "user", "content": ""}
    for block in blocks:
        match block.values.get("type"):
            case "text":
                yield {"role": "user", "content": _needed(block, "text")}
            case "tool_result":
                content = block.values.get("content")
                inner = [] if content is None else list(_blocks(content, block.where("content")))
                block.boolean("is_error")
                call_id = _needed(block, "tool_use_id")
                yield {"role": "tool", "tool_call_id": call_id, "content": _text(inner)}
            case _:
                raise _refused(block)


def _call(block: Fields) -> dict[str, Any]:
    arguments = block.mapping("input")
    if block.values.get("input") is None:
        raise invalid(arguments.path, "is required")
    function = {"name": _needed(block, "name"), "arguments": dict(arguments.values)}
    return {"id": _needed(block, "id"), "type": "function", "function": function}


def _assistant(blocks: list[Fields], is_last: bool) -> dict[str, Any]:
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        match block.values.get("type"):
            case "text":
                texts.append(_needed(block, "text"))
            case "thinking":
                block.text("signature")
                reasoning.append(_needed(block, "thinking"))
            case "redacted_thinking":
                block.text("data")  # nothing of ours is in it
            case "tool_use":
                calls.append(_call(block))
            case _:
                raise _refused(block)
    turn: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if reasoning:
        turn["reasoning_content"] = "\n\n".join(reasoning)
    if calls:
        turn["tool_calls"] = calls
    elif is_last:
        turn["prefix"] = True
    return turn
