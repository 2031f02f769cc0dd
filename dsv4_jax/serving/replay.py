"""Remembering answers that called tools, to put them back into prompts as the model said them.

Clients send such an answer back with its results, often without the reasoning that led to it, and
with arguments that are the same JSON in other words. The model does better with its own reasoning
in view, and the prompt cache needs its own tokens to the last one.
"""

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsv4_jax.encoding import Segment
from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.engine.blobs import BlobStore


@dataclass(frozen=True)
class Said:
    """An answer: its tokens to the end token, and what a client was told.

    `calls` are names and arguments; `in_reasoning` says where the tokens begin.
    """

    ids: array
    in_reasoning: bool
    reasoning: str
    content: str
    calls: tuple[tuple[str, str], ...]

    def is_told_by(self, turn: Mapping[str, Any]) -> bool:
        """Whether an assistant message says the same, arguments compared as JSON."""
        told = [(c["function"]["name"], c["function"]["arguments"]) for c in turn["tool_calls"]]
        return (
            turn["content"].strip() == self.content.strip()
            and turn["reasoning_content"] in ("", self.reasoning)
            and [name for name, _ in told] == [name for name, _ in self.calls]
            and all(_same(a, b) for (_, a), (_, b) in zip(told, self.calls, strict=True))
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ids": self.ids.tolist()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Said":
        calls = tuple((name, arguments) for name, arguments in raw["calls"])
        return cls(**{**raw, "ids": array("i", raw["ids"]), "calls": calls})


Find = Callable[[Sequence[str]], Said | None]


class ReplayStore:
    """Answers by the ids of their calls, per tenant; the least recently used ones are forgotten.

    Safe to use from several threads. Holds at most `max_tokens` tokens in memory; 0 keeps nothing
    anywhere. `blobs`, if set, keeps what is remembered, and knows it after a restart.
    """

    blobs: BlobStore | None = None

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokens = 0
        self._said: OrderedDict[tuple[str, str], Said] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, tenant: str, call_ids: Sequence[str], said: Said) -> None:
        """Remembers an answer under the first of its calls."""
        if not call_ids or len(said.ids) > self.max_tokens:
            return
        self._remember((tenant, call_ids[0]), said)
        if self.blobs is not None:
            text = json.dumps(said.to_json()).encode()
            self.blobs.put(_file(tenant, call_ids[0]), {}, [text])

    def _remember(self, key: tuple[str, str], said: Said) -> None:
        with self._lock:
            if (former := self._said.pop(key, None)) is not None:
                self._tokens -= len(former.ids)
            self._said[key] = said
            self._tokens += len(said.ids)
            while self._tokens > self.max_tokens:
                _, dropped = self._said.popitem(last=False)
                self._tokens -= len(dropped.ids)

    def find(self, tenant: str, call_ids: Sequence[str]) -> Said | None:
        """An answer by the ids of its calls; may read a file."""
        if not call_ids or not self.max_tokens:
            return None
        key = tenant, call_ids[0]
        with self._lock:
            if key in self._said:
                self._said.move_to_end(key)
                return self._said[key]
        if self.blobs is None or (blob := self.blobs.get(_file(*key))) is None:
            return None
        said = Said.from_json(json.loads(bytes(blob.payload)))
        self._remember(key, said)
        return said


def _file(tenant: str, call_id: str) -> str:
    """Name of the file of an answer, which says nothing about either."""
    salt = hashlib.sha256(tenant.encode()).digest()
    return f"r-{hashlib.sha256(salt + call_id.encode()).hexdigest()}"


def spliced(
    segments: Sequence[Segment],
    messages: Sequence[Mapping[str, Any]],
    find: Find,
    encode: Callable[[Sequence[Segment]], list[int]],
) -> tuple[list[int], int]:
    """Tokenises a prompt, with answers that are known in the tokens they were made of.

    Args:
        segments: the rendered `messages`.
        find: returns an answer by the ids of its calls.
        encode: tokenises what is not known.

    Returns:
        The ids, and how many answers were put in.
    """
    ids: list[int] = []
    done = count = 0
    for turn, (start, end) in zip(_answers(messages), _places(segments), strict=False):
        said = find([call["id"] for call in turn["tool_calls"] if call["id"]])
        if said is None or start is None or not said.is_told_by(turn):
            continue
        opens = segments[start - 1].text == C.THINK_START
        if opens != said.in_reasoning or turn["reasoning_content"] != said.reasoning:
            continue
        ids += [*encode(segments[done:start]), *said.ids]
        done, count = end + 1, count + 1
    return ids + encode(segments[done:]), count


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    is_whole = [m["role"] == "assistant" and not m.get("wo_eos") for m in messages]
    return [message for message, whole in zip(messages, is_whole, strict=True) if whole]


def _places(segments: Sequence[Segment]) -> list[tuple[int | None, int]]:
    """Where each answer begins, behind its think token, and the place of its end token."""
    places: list[tuple[int | None, int]] = []
    start: int | None = None
    for index, segment in enumerate(segments):
        if not segment.is_control:
            continue
        if segment.text == C.ASSISTANT:
            start = index + 2
        elif segment.text == C.EOS:
            places.append((start, index))
            start = None
    return places


def _same(one: str, other: str) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return one == other
