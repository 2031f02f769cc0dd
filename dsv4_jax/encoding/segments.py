"""Prompts as a list of segments: control tokens, and text that can never become one.

The list joins to the prompt string. Tokenising it piece by piece, instead of tokenising the
string, is what keeps a client's `<｜User｜>` ordinary text.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from dsv4_jax.encoding import constants as C

_TEMPLATE_CONTROLS = re.compile(
    "(" + "|".join(re.escape(token) for token in C.CONTROL_TOKENS) + ")"
)


class Segment(NamedTuple):
    """One control token (`is_control`, `text` is its full string) or a run of plain text."""

    text: str
    is_control: bool


class SegmentWriter:
    """Collects segments; neighbouring text merges, empty text vanishes."""

    def __init__(self) -> None:
        self._done: list[Segment] = []
        self._text: list[str] = []

    def control(self, token: str) -> None:
        self._flush()
        self._done.append(Segment(token, True))

    def text(self, text: str) -> None:
        """Adds text from anywhere: control strings inside it stay text."""
        if text:
            self._text.append(text)

    def template(self, text: str) -> None:
        """Adds one of our own constants: control strings inside it are control tokens."""
        for index, piece in enumerate(_TEMPLATE_CONTROLS.split(text)):
            if index % 2:
                self.control(piece)
            else:
                self.text(piece)

    def segments(self) -> list[Segment]:
        self._flush()
        return list(self._done)

    def _flush(self) -> None:
        if self._text:
            self._done.append(Segment("".join(self._text), False))
            self._text.clear()


def join_segments(segments: Iterable[Segment]) -> str:
    """The prompt as one string."""
    return "".join(segment.text for segment in segments)


def starts_in_reasoning(segments: Iterable[Segment]) -> bool:
    """Whether a completion of this prompt begins inside reasoning.

    True when the last control token is the opening think token; text behind it is reasoning that
    the model continues. A task token behind it means a plain answer.
    """
    controls = [segment.text for segment in segments if segment.is_control]
    return bool(controls) and controls[-1] == C.THINK_START


def render_raw(text: str, add_bos: bool = True) -> list[Segment]:
    """A plain completion prompt: the text as given, behind BOS unless switched off."""
    writer = SegmentWriter()
    if add_bos:
        writer.control(C.BOS)
    writer.text(text)
    return writer.segments()


def render_fim(prefix: str, suffix: str) -> list[Segment]:
    """A fill-in-the-middle prompt: the completion belongs between `prefix` and `suffix`.

    The order is that of earlier DeepSeek models; it was not confirmed on V4 weights.
    """
    writer = SegmentWriter()
    writer.control(C.BOS)
    writer.control(C.FIM_BEGIN)
    writer.text(prefix)
    writer.control(C.FIM_HOLE)
    writer.text(suffix)
    writer.control(C.FIM_END)
    return writer.segments()
