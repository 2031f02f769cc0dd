"""How the parameters of a tool are written, as Lark rules: raw text or JSON, by their schema."""

import json
from collections.abc import Mapping
from typing import Any

from dsv4_jax.serving.errors import invalid
from dsv4_jax.serving.grammar.reply import escaped_regex, json_rule

_ANY = frozenset({"string", "other"})
_STRING_KEYWORDS = {"type", "enum", "const", "pattern", "minLength", "maxLength"}
_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment", "readOnly"}
MAX_REFS = 32


def kinds_of(schema: Any, root: Mapping[str, Any], refs: int = 0) -> frozenset[str]:
    """Returns what a value may be: "string", "other" or both."""
    if not isinstance(schema, Mapping) or refs > MAX_REFS:
        return _ANY
    for key in ("$ref", "type", "enum", "const", "anyOf", "oneOf", "allOf"):
        if key in schema:
            return _kinds(key, schema[key], root, refs)
    return _ANY


def _kinds(key: str, value: Any, root: Mapping[str, Any], refs: int) -> frozenset[str]:
    match key:
        case "$ref":
            return kinds_of(_resolved(value, root), root, refs + 1)
        case "type":
            names = value if isinstance(value, list) else [value]
            return frozenset("string" if name == "string" else "other" for name in names)
        case "enum" if isinstance(value, list):
            return frozenset("string" if isinstance(item, str) else "other" for item in value)
        case "const":
            return frozenset({"string" if isinstance(value, str) else "other"})
        case _ if isinstance(value, list) and value:
            found = [kinds_of(item, root, refs + 1) for item in value]
            return frozenset.intersection(*found) if key == "allOf" else frozenset.union(*found)
    return _ANY


def _resolved(ref: Any, root: Mapping[str, Any]) -> Any:
    """Returns the schema a local reference names, {} if there is none."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return {}
    found: Any = root
    for step in ref[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        found = found.get(step, {}) if isinstance(found, Mapping) else {}
    return found


def has_refs(schema: Mapping[str, Any]) -> bool:
    """Whether a schema may hold references."""
    return '"$ref"' in json.dumps(schema)


def json_parameter(key: str, root: Mapping[str, Any], refs: bool, is_strict: bool) -> str:
    """Returns the right side of a rule for parameter `key` of the object schema `root`.

    `refs`: what `has_refs` says of `root`.
    """
    schema = root["properties"][key]
    if not isinstance(schema, Mapping):
        schema = {}
    elif refs:  # references are seen from the root
        place = key.replace("~", "~0").replace("/", "~1")
        ref = f"#/$defs/root/properties/{place}"
        schema = {"$ref": ref, "$defs": {"root": _moved(root)}}
    return json_rule(schema, is_lenient=not is_strict)


def _moved(schema: Any) -> Any:
    """Returns the schema with its local references as seen from where `json_parameter` puts it."""
    if isinstance(schema, Mapping):
        return {
            key: f"#/$defs/root{value[1:]}"
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value)
            for key, value in schema.items()
        }
    return [_moved(item) for item in schema] if isinstance(schema, list) else schema


def text_lexeme(schema: Any, root: Mapping[str, Any], param: str | None) -> str:
    """Returns a Lark expression for raw text up to the `</` of its closing tag.

    `param` names the field in errors; None means that keywords about the text do not count.

    Raises:
        ApiError: 400 `invalid_schema`, the schema has keywords that cannot be enforced.
    """
    for _ in range(MAX_REFS):
        if isinstance(schema, Mapping) and "$ref" in schema:
            schema = _resolved(schema["$ref"], root)
    if not isinstance(schema, Mapping):
        schema = {}
    literals = _literals(schema)
    if literals:
        ways = (json.dumps(f"{text}</", ensure_ascii=False) for text in literals)
        return f"({' | '.join(ways)})"
    if param is None:
        return r"/(?s:.*)<\//"
    unknown = sorted(schema.keys() - _STRING_KEYWORDS - _NOTES)
    if unknown:
        problem = f"uses keywords that are not supported: {', '.join(unknown)}"
        raise invalid(param, problem, "invalid_schema")
    return f"/{_pattern(schema, param)}<\\//"


def _literals(schema: Mapping[str, Any]) -> list[str]:
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
    return [value for value in values if isinstance(value, str)]


def _pattern(schema: Mapping[str, Any], param: str) -> str:
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    pattern = schema.get("pattern")
    if pattern is None:
        return f"(?s:.{{{low},{high}}})" if low or high != "" else "(?s:.*)"
    if low or high != "" or not isinstance(pattern, str):
        problem = "pattern cannot be combined with minLength and maxLength"
        raise invalid(param, problem, "invalid_schema")
    head = "" if pattern.startswith("^") else "(?s:.*)"
    tail = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    body = pattern.removeprefix("^")
    return f"{head}({escaped_regex(body if tail else body[:-1])}){tail}"
