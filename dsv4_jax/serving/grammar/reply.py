"""Rules for the content of a reply."""

import json
from collections.abc import Mapping
from typing import Any

from dsv4_jax.serving.errors import invalid
from dsv4_jax.serving.tool_fields import MAX_GRAMMAR_CHARS, ReplyFormat

# Enough for indented JSON; without a limit a model can write blanks for ever.
BLANKS = "[ \\n]{0,40}"


def reply_rules(reply: ReplyFormat, name: str = "start") -> str:
    """Returns Lark rules whose rule `name` is a whole reply of this format.

    Raises:
        ApiError: 400, the schema is too large.
    """
    match reply.kind:
        case "regex":
            return f"{name}: REGEX\nREGEX: /{escaped_regex(reply.value)}/\n"
        case "grammar":
            return reply.value
    schema = json_rule(reply.value)
    if len(schema) > MAX_GRAMMAR_CHARS:
        problem = f"is larger than {MAX_GRAMMAR_CHARS} characters"
        raise invalid("response_format.json_schema.schema", problem, "invalid_schema")
    return f"{name}: {schema}\n"


def json_rule(schema: Mapping[str, Any], is_lenient: bool = False) -> str:
    """Returns the right side of a rule: JSON that `schema` allows.

    `is_lenient` leaves out keywords that cannot be enforced; otherwise they are errors.
    """
    options = {"whitespace_pattern": BLANKS, "lenient": is_lenient}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def escaped_regex(pattern: str) -> str:
    """Returns `pattern` with every slash escaped, to stand between slashes."""
    pieces, is_escaped = [], False
    for char in pattern.replace("\n", "\\n"):
        pieces.append("\\/" if char == "/" and not is_escaped else char)
        is_escaped = char == "\\" and not is_escaped
    return "".join(pieces)
