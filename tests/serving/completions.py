"""Completions as text with control tokens, cut into tokens in any way, and what they parse to."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.events import Content, Event, Reasoning, ToolArguments, ToolStart
from dsv4_jax.serving.parser import CompletionParser, ControlIds

CONTROLS = {C.EOS: 1, C.USER: 2, C.THINK_START: 3, C.THINK_END: 4, C.DSML: 5}
IDS = ControlIds(think_end=4, dsml=5, eos=1, all=frozenset(CONTROLS.values()))
TEXT_ID = 0
_SPLIT = re.compile("(" + "|".join(map(re.escape, CONTROLS)) + ")")
Token = tuple[int, bytes]

BLOCK = "<｜DSML｜tool_calls>\n{}\n</｜DSML｜tool_calls>"


def invoke(name: str, *parameters: str) -> str:
    body = "\n".join(parameters)
    return f'<｜DSML｜invoke name="{name}">\n{body}\n</｜DSML｜invoke>'


def text_parameter(name: str, value: str) -> str:
    return f'<｜DSML｜parameter name="{name}" string="true">{value}</｜DSML｜parameter>'


def json_parameter(name: str, value: str) -> str:
    return f'<｜DSML｜parameter name="{name}" string="false">{value}</｜DSML｜parameter>'


def block(*calls: str) -> str:
    return BLOCK.format("\n".join(calls))


@dataclass
class Parsed:
    """What a client ends up with."""

    reasoning: str = ""
    content: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case ToolStart(index, name):
                    assert index == len(self.names)
                    self.names.append(name)
                    self.arguments.append("")
                case ToolArguments(index, text):
                    assert index == len(self.names) - 1, "arguments of a call that has ended"
                    self.arguments[index] += text


def pieces(completion: str) -> list[Token]:
    """Returns control tokens, and the text between them as one token each."""
    split = _SPLIT.split(completion)
    return [(CONTROLS.get(p, TEXT_ID), p.encode()) for p in split if p]


def cut(tokens: list[Token], sizes: Iterable[int]) -> list[Token]:
    """Cuts text tokens into tokens of `sizes` bytes, in turn; what is left stays whole."""
    sizes = iter(sizes)
    result: list[Token] = []
    for token, data in tokens:
        while token == TEXT_ID and data and (size := next(sizes, len(data))) < len(data):
            result.append((token, data[:size]))
            data = data[size:]
        result.append((token, data))
    return result


def run(
    tokens: Iterable[Token],
    *,
    reasoning: bool = False,
    tools: bool = True,
    truncated: bool = False,
    spelled_markers: bool = False,
) -> tuple[Parsed, CompletionParser]:
    parser = CompletionParser(
        IDS,
        reasoning=reasoning,
        tools=tools,
        known_tools=frozenset({"f", "g"}),
        spelled_markers=spelled_markers,
    )
    parsed = Parsed()
    for token, data in tokens:
        parsed.add(parser.feed(token, data))
    parsed.add(parser.finish(truncated))
    return parsed, parser
