"""Reading one DSML tag: the text that follows `<｜DSML｜` or `</｜DSML｜`.

The marker itself is a single token id, so only this short text has to be recognised.
"""

import re
from dataclasses import dataclass
from enum import Enum, auto

BLOCK, INVOKE, PARAMETER = "tool_calls", "invoke", "parameter"
MAX_TAG_CHARS = 1024

_NAME = re.compile(r'\s+name="(?P<name>.*)"\s*', re.DOTALL)
_NAME_AND_TYPE = re.compile(
    r'\s+name="(?P<name>.*)"\s+string="(?P<string>true|false)"\s*', re.DOTALL
)
_SPELLED = re.compile(r"(?P<bracket></?)(?P<marker>[|｜]DSML[|｜])")
_SPELLINGS = tuple(f"{b}{x}DSML{y}" for b in ("<", "</") for x in "|｜" for y in "|｜")
_BARE = re.compile(r"\s+name=(?P<name>[^\s\"]+)(?:\s+string=(?P<string>true|false))?\s*")


@dataclass(frozen=True, slots=True)
class Tag:
    """A whole tag; `length` is how many characters it took.

    `is_string` says how a parameter's value is written, None if the tag does not say.
    """

    word: str
    closes: bool
    length: int
    name: str = ""
    is_string: bool | None = None


class Verdict(Enum):
    """Why there is no tag (yet)."""

    MORE = auto()
    NOT_A_TAG = auto()


def find_spelled(text: str) -> re.Match[str] | None:
    """The first `bracket` and `marker` that are spelled out as text, with bars of either kind."""
    return _SPELLED.search(text)


def held_end(text: str, spelled: bool) -> str:
    """The end of `text` behind which a marker may follow, or be spelled out further."""
    whole = _SPELLINGS if spelled else ("</｜",)
    sizes = range(min(len(text), max(map(len, whole)) - 1), 0, -1)
    return next((text[-n:] for n in sizes if any(w.startswith(text[-n:]) for w in whole)), "")


def read_tag(text: str, closes: bool, words: frozenset[str]) -> Tag | Verdict:
    """Reads the tag at the start of `text`, if it is one of `words`.

    The result for a text decides for all longer ones: it does not depend on how text arrives.
    """
    for word in words:
        if text.startswith(word):
            return _read_rest(text, word, closes)
    is_beginning = any(word.startswith(text) for word in words)
    return Verdict.MORE if is_beginning else Verdict.NOT_A_TAG


def _read_rest(text: str, word: str, closes: bool) -> Tag | Verdict:
    end = _end_of_tag(text)
    if closes or word == BLOCK:
        if text[len(word) : end].strip():
            return Verdict.NOT_A_TAG
        return Tag(word, closes, end + 1) if end is not None else _unfinished(text)
    if text[len(word) :] and not text[len(word)].isspace():
        return Verdict.NOT_A_TAG
    if end is None:
        return _unfinished(text)
    attributes = text[len(word) : end]
    for pattern in (_NAME_AND_TYPE, _NAME, _BARE):
        if found := pattern.fullmatch(attributes):
            string = found.groupdict().get("string")
            is_string = None if string is None else string == "true"
            return Tag(word, closes, end + 1, found["name"], is_string)
    return Verdict.NOT_A_TAG


def _end_of_tag(text: str) -> int | None:
    """Returns the place of the `>` that ends the tag: not inside quotes, or right after one."""
    place = text.find(">", 0, MAX_TAG_CHARS)
    while place >= 0:
        head = text[:place]
        quotes = head.count('"')
        if quotes % 2 == 0 or (quotes > 1 and head.rstrip().endswith('"')):
            return place
        place = text.find(">", place + 1, MAX_TAG_CHARS)
    return None


def _unfinished(text: str) -> Verdict:
    return Verdict.MORE if len(text) < MAX_TAG_CHARS else Verdict.NOT_A_TAG
