"""From sampled tokens to reasoning, answer text and tool calls, piece by piece.

The structure of a completion is in single token ids (end of thinking, the DSML marker), so the
parser reads ids, not strings: text that merely looks like markup is text. It tolerates what a
model gets wrong, counts it in `counts`, and keeps two promises for every token sequence: texts
never contain control tokens, and a call's arguments are valid JSON unless the answer was cut off.
"""

import codecs
import re
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto

from dsv4_jax.serving.calls import WHITESPACE, CallWriter
from dsv4_jax.serving.events import Content, Event, Reasoning
from dsv4_jax.serving.tags import (
    BLOCK,
    INVOKE,
    PARAMETER,
    Tag,
    Verdict,
    find_spelled,
    held_end,
    read_tag,
)


@dataclass(frozen=True)
class ControlIds:
    """The token ids that structure a completion; `all` holds every control id there is."""

    think_end: int
    dsml: int
    eos: int
    all: frozenset[int]


class State(Enum):
    """Where in the completion the next token stands."""

    REASONING = auto()
    CONTENT = auto()
    BLOCK = auto()  # between calls
    CALL = auto()  # between the parameters of a call
    PARAMETER = auto()


_ANY = frozenset({BLOCK, INVOKE, PARAMETER})
_NONE: frozenset[str] = frozenset()
# Tags that mean something in each state, after "<" and after "</"; others are ordinary text.
_OPENERS = {
    State.REASONING: frozenset({BLOCK}),
    State.CONTENT: frozenset({BLOCK, INVOKE}),
    State.BLOCK: _ANY,
    State.CALL: _ANY,
    State.PARAMETER: _NONE,
}
_CLOSERS = {state: _NONE if state is State.REASONING else _ANY for state in State}


class CompletionParser:
    """Reads one completion. Without `tools`, tool markup is ordinary text.

    With `spelled_markers`, a marker of tools that is spelled out as text counts, outside reasoning.
    """

    def __init__(
        self,
        controls: ControlIds,
        *,
        reasoning: bool,
        tools: bool,
        known_tools: frozenset[str] = frozenset(),
        spelled_markers: bool = False,
    ) -> None:
        self.state = State.REASONING if reasoning else State.CONTENT
        self.counts: Counter[str] = Counter()
        self._controls = controls
        self._tools = tools
        self._takes_spelled = tools and spelled_markers
        self._spelled = ""  # how the marker of the tag being read was spelled out, if it was
        self._events: list[Event] = []
        self._calls = CallWriter(self._events, self.counts, known_tools)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces: list[str] = []  # held back: they vanish if a tool block follows
        self._bracket = ""  # held back: "<" or "</", or more, that may belong to a marker
        self._tag: str | None = None  # text after a marker, until it is a tag or is not
        self._after_block = False
        self._unopened_block = False  # the block began with a call, without its own tag

    @property
    def is_in_tag(self) -> bool:
        """Whether a marker was accepted and its tag is still being read."""
        return self._tag is not None

    def feed(self, token: int, data: bytes) -> list[Event]:
        """Takes the next token; `data` is its UTF-8 text and is ignored for control tokens."""
        if token in self._controls.all:
            self._text(self._utf8.decode(b"", True))
            self._control(token)
        else:
            self._text(self._utf8.decode(data))
        return self._taken()

    def finish(self, truncated: bool) -> list[Event]:
        """Ends the completion; `truncated` means it was cut off, so open JSON stays open."""
        self._text(self._utf8.decode(b"", True))
        if self._tag is not None and not self._spelled:
            self._tag = None
            self._drop_held()
        elif self._tag is not None:
            self._bracket += self._spelled + self._tag
        self._release()
        if self.state in (State.CALL, State.PARAMETER):
            self._calls.leave_open() if truncated else self._end_call()
        return self._taken()

    def _taken(self) -> list[Event]:
        events = self._events.copy()
        self._events.clear()
        return events

    # Control tokens

    def _control(self, token: int) -> None:
        if self._tag is not None:
            self._plain(self._rejected_tag())
        if token == self._controls.dsml:
            self._marker()
        elif token == self._controls.think_end and self.state is State.REASONING:
            self._release()
            self.state = State.CONTENT
        else:
            self.counts["stray_control"] += 1

    def _marker(self) -> None:
        if self._bracket in ("<", "</") and self._possible_words():
            self._tag = ""
        else:
            self.counts["stray_marker"] += 1

    def _possible_words(self) -> frozenset[str]:
        is_text = self.state in (State.REASONING, State.CONTENT)
        if is_text and not self._tools:
            return _NONE
        return _OPENERS[self.state] if self._bracket == "<" else _CLOSERS[self.state]

    # Text: first to a tag being read, then past what is held back, then to where it belongs

    def _text(self, text: str) -> None:
        while text and self._tag is not None:
            text = self._tag_text(text)
        if text:
            self._plain(text)

    def _tag_text(self, text: str) -> str:
        """Adds `text` to the tag being read; returns what is left of it."""
        self._tag = (self._tag or "") + text
        tag = read_tag(self._tag, self._bracket == "</", self._possible_words())
        if tag is Verdict.MORE:
            return ""
        if not isinstance(tag, Tag):
            return self._rejected_tag()
        self.counts["spelled_marker"] += bool(self._spelled)
        rest, self._tag, self._spelled = self._tag[tag.length :], None, ""
        self._bracket = ""
        self._close(tag) if tag.closes else self._open(tag)
        return rest

    def _rejected_tag(self) -> str:
        """Gives up reading a tag: its text, without the marker if that is a token, is ordinary."""
        text, self._tag = self._tag or "", None
        if self._spelled:
            self._bracket, self._spelled = self._bracket + self._spelled, ""
            self._release()
        else:
            self.counts["bad_tag"] += 1
        return text

    def _plain(self, text: str) -> None:
        text = self._bracket + text
        takes_spelled = self._takes_spelled and self.state is not State.REASONING
        if takes_spelled and (found := find_spelled(text)):
            return self._spelled_marker(text, found)
        self._bracket = held_end(text, takes_spelled)
        self._pass_on(text[: len(text) - len(self._bracket)])

    def _spelled_marker(self, text: str, found: re.Match[str]) -> None:
        """Text in front of the marker, the marker, and what follows."""
        self._bracket = ""
        self._pass_on(text[: found.start()])
        self._bracket, self._spelled = found["bracket"], found["marker"]
        if self._possible_words():
            self._tag = ""
            self._text(text[found.end() :])
        else:
            self._plain(self._rejected_tag() + text[found.end() :])

    def _pass_on(self, text: str) -> None:
        """Lets text out but for spaces at its end, which vanish if a tool block follows."""
        if self.state is State.PARAMETER:
            return self._emit(text)
        kept = text.rstrip(WHITESPACE)
        if kept:
            self._emit("".join(self._spaces) + kept)
            self._spaces = []
        self._spaces.append(text[len(kept) :])

    def _release(self) -> None:
        text = "".join(self._spaces) + self._bracket
        self._drop_held()
        self._emit(text)

    def _drop_held(self) -> None:
        self._spaces, self._bracket = [], ""

    def _emit(self, text: str) -> None:
        if not text:
            return
        match self.state:
            case State.REASONING:
                self._events.append(Reasoning(text))
            case State.CONTENT:
                self._emit_content(text)
            case State.BLOCK:
                self._emit_between_calls(text)
            case State.CALL | State.PARAMETER:
                self._calls.text(text)

    def _emit_content(self, text: str) -> None:
        if self._after_block:
            text = text.lstrip(WHITESPACE)
            if not text:
                return
            self._after_block = False
            self.counts["text_after_tools"] += 1
        self._events.append(Content(text))

    def _emit_between_calls(self, text: str) -> None:
        if not text.strip(WHITESPACE):
            return
        if self._unopened_block:
            self._end_block()
            self._emit(text)
        else:
            self.counts["stray_text"] += 1

    # Tags

    def _open(self, tag: Tag) -> None:
        self._drop_held()
        if tag.word == PARAMETER and self.state is State.CALL:
            self._calls.start_parameter(tag.name, tag.is_string)
            self.state = State.PARAMETER
        elif tag.word == INVOKE:
            self._start_call(tag.name)
        elif tag.word == BLOCK and self.state in (State.REASONING, State.CONTENT):
            self._start_block(has_tag=True)
        else:
            self.counts["stray_tag"] += 1

    def _close(self, tag: Tag) -> None:
        if self.state is not State.CONTENT:
            self._drop_held()
        if tag.word == BLOCK and self.state is not State.CONTENT:
            self._end_block()
        elif tag.word == INVOKE and self.state in (State.CALL, State.PARAMETER):
            self._end_call()
        elif tag.word == PARAMETER and self.state is State.PARAMETER:
            self._calls.end_parameter()
            self.state = State.CALL
        else:
            self.counts["stray_tag"] += 1

    def _start_block(self, has_tag: bool) -> None:
        self.counts["implicit_think_end"] += self.state is State.REASONING
        self.counts["extra_block"] += self._calls.total > 0
        self.counts["unopened_block"] += not has_tag
        self._unopened_block = not has_tag
        self.state = State.BLOCK

    def _end_block(self) -> None:
        if self.state is not State.BLOCK:
            self._end_call()
        self.state = State.CONTENT
        self._after_block = True

    def _start_call(self, name: str) -> None:
        if self.state is State.CONTENT:
            self._start_block(has_tag=False)
        elif self.state is State.CALL:
            self._end_call()
        self._calls.start(name)
        self.state = State.CALL

    def _end_call(self) -> None:
        self._calls.end()
        self.state = State.BLOCK
