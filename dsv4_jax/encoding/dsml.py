"""Tool declarations and tool calls as DeepSeek-V4 sees them (DSML, the tool markup)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.errors import EncodingError
from dsv4_jax.encoding.segments import SegmentWriter


def to_json(value: Any, where: str) -> str:
    """JSON as prompts spell it: `, ` and `: ` between items, non-ASCII raw, key order kept."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodingError(where, f"cannot be written as JSON: {error}") from None


def write_tools(writer: SegmentWriter, tools: Sequence[Any], where: str) -> None:
    """Declares `tools` (OpenAI format), one function object as one line of JSON."""
    lines = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or "function" not in tool:
            raise EncodingError(f"{where}.tools[{index}]", "needs a `function` object")
        lines.append(to_json(tool["function"], f"{where}.tools[{index}].function"))
    writer.template(C.TOOLS_HEAD)
    writer.text("\n".join(lines))
    writer.text(C.TOOLS_TAIL)


def write_response_format(writer: SegmentWriter, schema: Any, where: str) -> None:
    """Asks for a reply that follows `schema`."""
    writer.text(C.RESPONSE_FORMAT_HEAD)
    writer.text(to_json(schema, f"{where}.response_format"))


def write_tool_calls(writer: SegmentWriter, calls: Sequence[Any], where: str) -> None:
    """Repeats the tool calls of an earlier assistant turn (OpenAI format) as a DSML block."""
    _open_tag(writer, C.TOOL_BLOCK)
    for index, call in enumerate(calls):
        name, arguments = _call_parts(call, f"{where}.tool_calls[{index}]")
        writer.text("\n")
        _open_tag(writer, f'invoke name="{name}"')
        writer.text("\n")
        for position, (key, value) in enumerate(arguments.items()):
            if position:
                writer.text("\n")
            _write_parameter(writer, key, value, f"{where}.tool_calls[{index}]")
        writer.text("\n")
        _close_tag(writer, "invoke")
    writer.text("\n")
    _close_tag(writer, C.TOOL_BLOCK)


def parse_arguments(arguments: Any, where: str) -> dict[str, Any]:
    """The parameters of one call.

    What is not JSON text (including an already decoded object, as in the published encoder)
    becomes a single parameter named `arguments`.
    """
    try:
        parsed = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        return {"arguments": arguments}
    if not isinstance(parsed, dict):
        kind = type(parsed).__name__
        raise EncodingError(where, f"must hold a JSON object, not a JSON value of type {kind}")
    return parsed


def _call_parts(call: Any, where: str) -> tuple[Any, dict[str, Any]]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise EncodingError(where, "needs a `function` object")
    for key in ("name", "arguments"):
        if key not in function:
            raise EncodingError(f"{where}.function.{key}", "is missing")
    arguments = parse_arguments(function["arguments"], f"{where}.function.arguments")
    return function["name"], arguments


def _write_parameter(writer: SegmentWriter, key: str, value: Any, where: str) -> None:
    is_string = isinstance(value, str)
    flag = "true" if is_string else "false"
    _open_tag(writer, f'parameter name="{key}" string="{flag}"')
    writer.text(value if is_string else to_json(value, f"{where}.function.arguments.{key}"))
    _close_tag(writer, "parameter")


def _open_tag(writer: SegmentWriter, inside: str) -> None:
    writer.text("<")
    writer.control(C.DSML)
    writer.text(inside + ">")


def _close_tag(writer: SegmentWriter, name: str) -> None:
    writer.text("</")
    writer.control(C.DSML)
    writer.text(name + ">")
