"""Writing the arguments of tool calls as JSON text, piece by piece."""

import json
from collections import Counter
from enum import Enum, auto

from dsv4_jax.serving.events import Event, ToolArguments, ToolStart

WHITESPACE = " \t\r\n"


class Value(Enum):
    """How the open parameter is treated."""

    STRING = auto()  # raw text, passed on at once
    JSON = auto()  # kept until it is whole, then checked
    DROPPED = auto()  # its name came before; the first value is already on its way


class CallWriter:
    """Turns calls into events, appended to `events`; what had to be repaired goes to `counts`.

    However the pieces arrive, the arguments of an ended call are one valid JSON object.
    """

    def __init__(self, events: list[Event], counts: Counter[str], known: frozenset[str]) -> None:
        self.total = 0
        self._events = events
        self._counts = counts
        self._known = known
        self._names: set[str] = set()
        self._body: list[str] = []  # text in place of parameters
        self._value: Value | None = None
        self._json: list[str] = []  # key, then the text of a JSON value

    def start(self, name: str) -> None:
        self._counts["unknown_tool"] += name not in self._known
        self._events.append(ToolStart(self.total, name))
        self.total += 1
        self._names, self._body = set(), []

    def text(self, text: str) -> None:
        """Takes text of the open parameter, or text that stands where parameters should."""
        match self._value:
            case Value.STRING:
                self._write(_quoted(text)[1:-1])
            case Value.JSON:
                self._json.append(text)
            case None if not self._names:
                self._body.append(text if self._body else text.lstrip(WHITESPACE))
            case None:
                self._counts["stray_text"] += bool(text.strip(WHITESPACE))

    def start_parameter(self, name: str, is_string: bool | None) -> None:
        if self._body:
            self._counts["stray_text"] += 1
            self._body = []
        if name in self._names:
            self._counts["duplicate_parameter"] += 1
            self._value = Value.DROPPED
            return
        key = f"{', ' if self._names else '{'}{_quoted(name)}: "
        self._names.add(name)
        if is_string:
            self._value = Value.STRING
            self._write(key + '"')
        else:
            self._counts["untyped_parameter"] += is_string is None
            self._value = Value.JSON
            self._json = [key]

    def end_parameter(self) -> None:
        if self._value is Value.STRING:
            self._write('"')
        elif self._value is Value.JSON:
            key, text = self._json[0], "".join(self._json[1:])
            is_json = _parsed(text) is not _BROKEN
            self._counts["bad_parameter_json"] += not is_json
            self._write(key + (text.strip(WHITESPACE) if is_json else _quoted(text)))
        self._value = None

    def end(self) -> None:
        if self._value is not None:
            self._counts["unclosed_parameter"] += 1
            self.end_parameter()
        self._write("}" if self._names else self._body_as_object())

    def leave_open(self) -> None:
        """Writes what is held of a call that was cut off, as it stands."""
        if self._value is Value.JSON:
            self._write("".join(self._json))
        elif self._value is None and not self._names:
            self._write("".join(self._body))

    def _body_as_object(self) -> str:
        text = "".join(self._body).rstrip(WHITESPACE)
        if not text:
            return "{}"
        self._counts["json_body"] += 1
        is_object = isinstance(_parsed(text), dict)
        return text if is_object else f'{{"arguments": {_quoted(text)}}}'

    def _write(self, text: str) -> None:
        if text:
            self._events.append(ToolArguments(self.total - 1, text))


_BROKEN = object()


def _parsed(text: str) -> object:
    """Returns the JSON value of `text`, or `_BROKEN`; NaN and Infinity are not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _BROKEN


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
