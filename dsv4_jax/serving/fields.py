"""Reading typed values out of a JSON object; null counts as absent."""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

from dsv4_jax.serving.errors import invalid

_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}


_log = logging.getLogger(__name__)


def check_known(values: Mapping[str, Any], known: Collection[str], refuses: bool) -> None:
    """Notes fields of a request that mean nothing here, or refuses them.

    Raises:
        ApiError: 400, there is one.
    """
    unknown = [name for name in values if name not in known]
    if unknown and refuses:
        raise invalid(ascii(unknown[0])[1:-1][:100], "is not a field of this request")
    if unknown:
        _log.debug("ignored unknown request fields: %.200s", ascii(unknown))


class Fields:
    """One JSON object of a request; errors name the field by its path.

    Raises (every method):
        ApiError: 400, the value has the wrong type or is out of range.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values = values
        self.path = path

    def where(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(self.where(name), f"must be an integer, not {_shown(value)}")
        if not low <= value <= high:
            raise invalid(self.where(name), f"{_shown(value)} is not in [{low}, {high}]")
        return value

    def number(self, name: str, low: float, high: float, low_is_out: bool = False) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(self.where(name), f"must be a number, not {_shown(value)}")
        is_inside = (low < value if low_is_out else low <= value) and value <= high
        if not is_inside or not math.isfinite(value):
            bracket = "(" if low_is_out else "["
            raise invalid(self.where(name), f"{_shown(value)} is not in {bracket}{low}, {high}]")
        return float(value)

    def boolean(self, name: str) -> bool | None:
        return self._typed(name, bool)

    def text(self, name: str, choices: Collection[str] = ()) -> str | None:
        value = self._typed(name, str)
        if value is not None and choices and value not in choices:
            known = ", ".join(choices)
            raise invalid(self.where(name), f"{_shown(value)} is not one of {known}")
        return value

    def array(self, name: str, max_items: int) -> list[Any] | None:
        value = self._typed(name, list)
        if value is not None and len(value) > max_items:
            problem = f"has {len(value)} items, at most {max_items} are allowed"
            raise invalid(self.where(name), problem)
        return value

    def mapping(self, name: str) -> "Fields":
        """The object called `name`; an empty one if it is absent."""
        return Fields(self._typed(name, dict) or {}, self.where(name))

    def _typed(self, name: str, kind: type) -> Any:
        value = self.values.get(name)
        if value is not None and not isinstance(value, kind):
            raise invalid(self.where(name), f"must be {_NAMES[kind]}, not {_shown(value)}")
        return value


def _shown(value: object) -> str:
    """A value as an error shows it: short, whatever the client sent."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    is_plain = isinstance(value, str | int | float)
    text = ascii(value) if is_plain else _NAMES.get(type(value), type(value).__name__)
    return text if len(text) <= 60 else f"{text[:57]}..."
