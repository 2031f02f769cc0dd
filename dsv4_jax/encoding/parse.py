"""The strict parser of completions: the published grammar and nothing beside it.

    [reasoning </think>] content [blank line + tool block] EOS

The first part is there in thinking mode only. This is the oracle for tests and for training data;
a server that faces a sampling model parses token by token and tolerates more.
"""

import json
import re
from typing import Any, Literal, NoReturn

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.errors import CompletionError, EncodingError

_BLOCK_OPEN = f"\n\n<{C.DSML}{C.TOOL_BLOCK}"
_BLOCK_CLOSE = f"</{C.DSML}{C.TOOL_BLOCK}>"
_INVOKE_OPEN = f"<{C.DSML}invoke"
_INVOKE_CLOSE = f"</{C.DSML}invoke"
_PARAMETER_OPEN = f"<{C.DSML}parameter"
_PARAMETER_CLOSE = f"/{C.DSML}parameter"

# What stands between two tags of a call. The optional second newline is the empty line of a call
# without parameters.
_INVOKE_REST = re.compile(r'\s*name="(?P<name>.*?)">\n\n?', re.DOTALL)
_PARAMETER_REST = re.compile(
    r' name="(?P<key>.*?)" string="(?P<flag>true|false)">(?P<value>.*?)<\n?', re.DOTALL
)

_FORBIDDEN = (C.BOS, C.EOS, C.THINK_START, C.THINK_END, C.DSML)


def parse_message_from_completion_text(
    text: str, thinking_mode: Literal["thinking", "chat"] = "thinking"
) -> dict[str, Any]:
    """Splits one completion, EOS included, into an assistant message.

    Args:
        text: everything the model generated after a prompt of `encode_messages`.
        thinking_mode: the mode of that prompt; in "thinking" the text starts inside reasoning.

    Returns:
        `role`, `content`, `reasoning_content` ("" without reasoning) and `tool_calls`, a list in
        OpenAI format without ids. `arguments` is JSON text, except that the value of a parameter
        declared `string="false"` is copied unchecked.

    Raises:
        CompletionError: for any other shape of text. As published, EOS may be missing after a tool
            block, also where the block breaks off right before its next tag.
    """
    if thinking_mode not in ("thinking", "chat"):
        raise EncodingError("thinking_mode", f"{thinking_mode!r} must be 'thinking' or 'chat'")
    scanner = _Scanner(text)
    reasoning, calls = "", []
    if thinking_mode == "thinking":
        reasoning, stop = scanner.until(C.THINK_END, _BLOCK_OPEN)
        if stop is None:
            scanner.fail("missing </think>")
        if stop != C.THINK_END:
            scanner.fail("a tool block begins inside reasoning, before </think>")
    content, stop = scanner.until(C.EOS, _BLOCK_OPEN)
    if stop is None:
        scanner.fail("missing end-of-sentence token")
    if stop == _BLOCK_OPEN:
        calls = _tool_calls(scanner)
        rest, stop = scanner.until(C.EOS)
        if rest:
            scanner.fail("text after the tool block")
    if scanner.position < len(text):
        scanner.fail("text after the end-of-sentence token")
    for token in _FORBIDDEN:
        for name, part in (("reasoning", reasoning), ("content", content)):
            if token in part:
                scanner.fail(f"control token {token} inside {name}", text.find(token))
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }


class _Scanner:
    """A position in a text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.start = 0

    @property
    def at_end(self) -> bool:
        return self.position >= len(self.text)

    def until(self, *stops: str) -> tuple[str, str | None]:
        """Moves behind the nearest of `stops`; returns the text before it and which one it was."""
        found = [(self.text.find(stop, self.position), stop) for stop in stops]
        at, stop = min((hit for hit in found if hit[0] >= 0), default=(len(self.text), None))
        self.start = self.position
        self.position = at + len(stop or "")
        return self.text[self.start : at], stop

    def fail(self, problem: str, position: int | None = None) -> NoReturn:
        """Raises, pointing at the part that was read last."""
        raise CompletionError(problem, self.start if position is None else position)


def _tool_calls(scanner: _Scanner) -> list[dict[str, Any]]:
    calls = []
    while not scanner.at_end:
        between, stop = scanner.until(_INVOKE_OPEN, _BLOCK_CLOSE)
        if between != ">\n":
            scanner.fail(f"expected '>' and a newline before the next tag, found {between[:40]!r}")
        if stop is None:
            scanner.fail("the tool block has no end")
        if stop == _BLOCK_CLOSE:
            break
        calls.append(_call(scanner))
    return calls


def _call(scanner: _Scanner) -> dict[str, Any]:
    rest, stop = scanner.until(_PARAMETER_OPEN, _INVOKE_CLOSE)
    match = _INVOKE_REST.fullmatch(rest)
    if match is None:
        scanner.fail(f"malformed invoke tag or body: {rest[:40]!r}")
    values: dict[str, str] = {}
    while stop == _PARAMETER_OPEN:
        key, value = _parameter(scanner)
        if key in values:
            scanner.fail(f"duplicate parameter {key!r}")
        values[key] = value
        between, stop = scanner.until(_PARAMETER_OPEN, _INVOKE_CLOSE)
        if between != ">\n":
            scanner.fail(f"expected '>' and a newline after a parameter, found {between[:40]!r}")
    arguments = ", ".join(f"{_json(key)}: {value}" for key, value in values.items())
    function = {"name": match["name"], "arguments": "{" + arguments + "}"}
    return {"type": "function", "function": function}


def _parameter(scanner: _Scanner) -> tuple[str, str]:
    """Name of the next parameter, and its value as JSON text."""
    rest, _ = scanner.until(_PARAMETER_CLOSE)
    match = _PARAMETER_REST.fullmatch(rest)
    if match is None:
        scanner.fail(f"malformed parameter: {rest[:60]!r}")
    value = match["value"]
    return match["key"], _json(value) if match["flag"] == "true" else value


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
