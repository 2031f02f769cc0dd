"""What every skill module makes, and how its instances are kept apart."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "held-out")
HELD_OUT_SHARE = 16  # one instance in so many
ATTEMPTS = 10000


@dataclass(frozen=True)
class Example:
    """One conversation with its reference answers.

    messages: as the encoder takes them, assistant turns included. text: instead of them, learnt
    whole. tools: declarations or nothing.
    thinking: whether the assistant reasons. instances: what no other split may contain.
    tables: what look-up tools answer, for whoever plays them: tool name to key to value.
    """

    skill: str
    messages: list[dict[str, Any]]
    thinking: bool = False
    instances: tuple[str, ...] = ()
    tools: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    text: str | None = None

    def item(self) -> dict[str, Any]:
        """As a line of JSON for `prepare_data.py`; `skill` and `tables` are for evaluation."""
        if self.text is not None:
            return {"skill": self.skill, "text": self.text}
        out: dict[str, Any] = {"skill": self.skill, "messages": self.messages}
        out["thinking"] = self.thinking
        if self.tools:
            out["tools"] = self.tools
        if self.tables:
            out["tables"] = self.tables
        return out


def split_of(instance: str) -> str:
    """The only split that may contain an instance: a function of its text."""
    digest = hashlib.blake2b(instance.encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest) % HELD_OUT_SHARE == 0]


@dataclass(frozen=True)
class Maker:
    """Where a skill draws from.

    rng: the only source of chance. split: which instances may be used. level: 0 (shortest) to 3.
    tokens: about how long a document may become. filler: text of about so many tokens.
    """

    rng: random.Random
    split: str
    level: int
    tokens: int
    filler: Callable[[int], list[str]]

    def draw(self, make: Callable[[], tuple[str, Any]]) -> tuple[str, Any]:
        """Repeats `make`, which returns (instance, value), until its instance is in the split.

        Raises:
            ValueError: hardly any instance is, so that the skill cannot be held out.
        """
        instance = ""
        for _ in range(ATTEMPTS):
            instance, value = make()
            if split_of(instance) == self.split:
                return instance, value
        raise ValueError(f"no instance like {instance!r} belongs to the split {self.split!r}")

    def choice(self, items: Any) -> Any:
        return self.rng.choice(items)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"role": "assistant", "content": text}
    return found | ({"reasoning_content": reasoning} if reasoning else {})
