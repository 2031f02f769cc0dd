"""Text between the facts of a document: sentences that say nothing that is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv4_jax.training.skills import words
from dsv4_jax.training.skills.base import split_of

PATTERNS = (
    "The {a} lies behind the {b}.",
    "Nobody saw the {a} near the {b}.",
    "They carried the {a} to the {b} before noon.",
    "A {a} and a {b} stood in the rain.",
    "We talked about the {a} all evening.",
    "It was late, and the {a} was still warm.",
    "Some say the {a} was older than the {b}.",
    "In the morning the {a} looked smaller.",
)
SHORTEST, LONGEST = 20, 200  # characters of a paragraph that is kept


class Filler:
    """Draws lines of about so many tokens: runs of a text's paragraphs, or made-up sentences.

    count: how many tokens a line has. texts: paragraphs of each work, in order; every work is cut
    into the splits by stretches of paragraphs, so that no paragraph is in both.
    """

    def __init__(
        self,
        rng: random.Random,
        split: str,
        count: Callable[[str], int],
        texts: Sequence[Sequence[str]] = (),
        share: float = 0.5,
    ) -> None:
        self.rng, self.count, self.share = rng, count, share
        cut = [[p for p in work if split_of(p) == split] for work in texts]
        self.works = [work for work in cut if work]

    def __call__(self, tokens: int) -> list[str]:
        if self.works and self.rng.random() < self.share:
            return self._fill(tokens, self._run())
        return self._fill(tokens, iter(self._sentence, None))

    def _fill(self, tokens: int, lines) -> list[str]:
        found: list[str] = []
        for line in lines:
            tokens -= self.count(line) + 1
            if tokens < 0:
                break
            found.append(line)
        return found

    def _run(self):
        """Paragraphs from a random place on, around to its start."""
        work = self.rng.choice(self.works)
        start = self.rng.randrange(len(work))
        while True:
            yield work[start % len(work)]
            start += 1

    def _sentence(self) -> str:
        a, b = self.rng.sample((*words.THINGS, *words.ANIMALS), 2)
        return self.rng.choice(PATTERNS).format(a=a, b=b)


def read_texts(folder: str | Path) -> list[list[str]]:
    """Paragraphs of every `*_gut.txt` (else every `.txt`) under a folder, joined to single lines.

    Raises:
        ValueError: there are none.
    """
    files = sorted(Path(folder).rglob("*_gut.txt")) or sorted(Path(folder).rglob("*.txt"))
    if not files:
        raise ValueError(f"{folder} holds no .txt files")
    return [_paragraphs(path.read_text(encoding="utf-8", errors="replace")) for path in files]


def _paragraphs(text: str) -> list[str]:
    found: dict[str, None] = {}
    for block in text.replace("\r", "").split("\n\n"):
        line = " ".join(block.split())
        while len(line) > LONGEST:
            at = line.rfind(" ", 0, LONGEST)
            at = LONGEST if at < SHORTEST else at
            found.setdefault(line[:at].strip())
            line = line[at:].strip()
        if len(line) >= SHORTEST:
            found.setdefault(line)
    return list(found)
