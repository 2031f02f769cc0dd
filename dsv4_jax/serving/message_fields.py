"""The fields of chat messages: their types are checked whether or not a role makes use of them."""

from typing import Any

from dsv4_jax.serving.errors import invalid
from dsv4_jax.serving.fields import Fields
from dsv4_jax.serving.sampling_fields import ANY_COUNT

_TEXTS = ("reasoning_content", "reasoning", "tool_call_id", "name")


def check_messages(messages: list[Any]) -> None:
    """Checks what later steps do not look at, so that a mistake never passes in silence.

    Raises:
        ApiError: 400, naming the field.
    """
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise invalid(where, "must be an object")
        fields = Fields(message, where)
        for name in _TEXTS:
            fields.text(name)
        fields.boolean("prefix")
        for number, call in enumerate(fields.array("tool_calls", ANY_COUNT) or ()):
            _check_call(call, f"{where}.tool_calls[{number}]")


def _check_call(call: Any, where: str) -> None:
    if not isinstance(call, dict):
        raise invalid(where, "must be an object")
    fields = Fields(call, where)
    fields.text("id")
    fields.text("type", ("function",))
    if call.get("function") is None:
        raise invalid(f"{where}.function", "is required")
    function = fields.mapping("function")
    if function.text("name") is None:
        raise invalid(f"{where}.function.name", "is required")
    if not isinstance(function.values.get("arguments"), dict):
        function.text("arguments")
