"""Short words for JSON schemas."""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}
NOTHING: Schema = {"type": "null"}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def list_of(items: Schema, most: int | None = None) -> Schema:
    return {"type": "array", "items": items} | ({} if most is None else {"maxItems": most})


def one_of(*values: str | None) -> Schema:
    return {"enum": list(values)}


def number(low: float, high: float, is_open: bool = False) -> Schema:
    """A number between two limits; `is_open` leaves the lower one out."""
    return {"type": "number", ("exclusiveMinimum" if is_open else "minimum"): low, "maximum": high}


def integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def maybe(schema: Schema) -> Schema:
    """The schema, or null."""
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, NOTHING]}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def reply(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object of a reply: exactly these fields."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def asked(fields: dict[str, Schema], required: tuple[str, ...]) -> Schema:
    """An object of a request: null counts as absent, and unknown fields are ignored."""
    shown = {name: value if name in required else maybe(value) for name, value in fields.items()}
    return {"type": "object", "properties": shown, "required": list(required)}
