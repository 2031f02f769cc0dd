"""Checks and conversions of the values inside API messages."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from dsv4_jax.encoding.errors import EncodingError

_MAX_DEPTH = 100  # of JSON values; beyond it Python's own recursion limit comes near


def check_text(text: str, where: str) -> str:
    """Refuses lone surrogates: they have no UTF-8 form, so no tokens."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise EncodingError(
                where, f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
            ) from None
    return text


def check_json(value: Any, where: str, depth: int = 0) -> Any:
    """Refuses what JSON text cannot carry: NaN, infinities, lone surrogates, deep nesting."""
    if depth > _MAX_DEPTH:
        raise EncodingError(where, f"nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise EncodingError(where, f"{value} is not JSON")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise EncodingError(where, f"key {key!r} must be a string")
            check_json(item, f"{where}.{check_text(key, where)}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]", depth + 1)
    elif value is not None and not isinstance(value, int | float):
        raise EncodingError(where, f"{type(value).__name__} is not JSON")
    return value


def content_text(content: Any, where: str) -> str:
    """Message content as text: a string, null (empty) or text parts, joined by blank lines."""
    if content is None:
        return ""
    if isinstance(content, str):
        return check_text(content, where)
    if not isinstance(content, list):
        raise EncodingError(where, f"must be text, parts or null, not {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            problem = f"part type {kind!r} is not supported, only 'text'"
            raise EncodingError(f"{where}[{index}]", problem, "unsupported_content_type")
        texts.append(optional_text(part, "text", f"{where}[{index}]") or "")
    return "\n\n".join(texts)


def optional_text(fields: Mapping[str, Any], key: str, where: str) -> str | None:
    """A field that is text, null or absent."""
    value = fields.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise EncodingError(f"{where}.{key}", f"must be text, not {type(value).__name__}")
    return check_text(value, f"{where}.{key}")


def tool_list(tools: Any, where: str) -> list[dict[str, Any]]:
    """Tool declarations, without our own control key `strict`, which is not for the model."""
    if not isinstance(tools, list | tuple):
        raise EncodingError(where, f"must be a list, not {type(tools).__name__}")
    checked = []
    for index, tool in enumerate(tools):
        at = f"{where}[{index}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise EncodingError(at, "needs a `function` object")
        _name(function, f"{at}.function")
        check_json(function, f"{at}.function")
        kept = {key: value for key, value in function.items() if key != "strict"}
        checked.append({"type": "function", "function": kept})
    return checked


def tool_call_list(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls of an assistant message, with `arguments` as JSON text."""
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        raise EncodingError(where, f"must be a list, not {type(calls).__name__}")
    checked = []
    for index, call in enumerate(calls):
        at = f"{where}[{index}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise EncodingError(at, "needs a `function` object")
        name = _name(function, f"{at}.function")
        arguments = _arguments(function.get("arguments"), f"{at}.function.arguments")
        kept = {"type": "function", "function": {"name": name, "arguments": arguments}}
        checked.append({"id": optional_text(call, "id", at), **kept})
    return checked


def response_schema(response_format: Any, where: str = "response_format") -> Mapping | None:
    """The JSON schema a reply must follow, if the request carries one."""
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise EncodingError(where, f"must be an object, not {type(response_format).__name__}")
    if response_format.get("type") != "json_schema":
        return None
    holder = response_format.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if not isinstance(schema, Mapping):
        raise EncodingError(f"{where}.json_schema.schema", "must be an object", "invalid_schema")
    return check_json(schema, f"{where}.json_schema.schema")


def _name(function: Mapping[str, Any], where: str) -> str:
    name = optional_text(function, "name", where)
    if not name:
        raise EncodingError(f"{where}.name", "is missing or empty")
    return name


def _arguments(arguments: Any, where: str) -> str:
    """JSON text of one call's arguments. Text that is not JSON passes; absent ones are `{}`."""
    if isinstance(arguments, Mapping):
        return json.dumps(check_json(arguments, where), ensure_ascii=False)
    if arguments is None:
        return "{}"
    if not isinstance(arguments, str):
        raise EncodingError(where, f"must be JSON text, not {type(arguments).__name__}")
    if not arguments.strip():
        return "{}"

    def refuse(constant: str) -> NoReturn:
        raise EncodingError(where, f"{constant} is not JSON")

    try:
        parsed = json.loads(arguments, parse_constant=refuse)
    except EncodingError:
        raise
    except RecursionError:
        raise EncodingError(where, f"nested deeper than {_MAX_DEPTH} levels") from None
    except ValueError:
        return check_text(arguments, where)
    if not isinstance(parsed, dict):
        raise EncodingError(where, "must hold a JSON object")
    check_json(parsed, where)
    return arguments
