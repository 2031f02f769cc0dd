"""Files of skills: chats as JSON lines, and the tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.data.documents import render, tokenise
from dsv4_jax.training.skills import words
from dsv4_jax.training.skills.base import SPLITS
from dsv4_jax.training.skills.corpus import LEVELS, SKILLS, examples
from dsv4_jax.training.skills.filler import read_texts
from dsv4_jax.training.skills.vocabulary import train_tokenizer

EVERY = 2000  # chats between lines of progress
VOCABULARY_CHATS = 6000
WORD_WEIGHT = 200  # how often every word of the skills is shown, with and without a space


def write_chats(
    out: str,
    tokenizer: str,
    count: int,
    tokens: int,
    level: int,
    split: str,
    seed: int,
    mix: Mapping[str, float] | None,
    thinking: float,
    texts: str | None,
    progress: Callable[[str], None] = print,
) -> str:
    """Writes `count` chats of at most `tokens` tokens to a file; longer ones are drawn anew.

    Raises:
        ValueError: an option is refused (see `examples`), or nearly all chats are too long.
    """
    vocabulary = Tokenizer.from_dir(tokenizer)
    paragraphs = read_texts(texts) if texts else []
    mix = mix or dict.fromkeys(SKILLS, 1.0)
    size = lambda text: len(vocabulary.encode_text(text))  # noqa: E731
    stream = examples(mix, seed, split, level, tokens, size, paragraphs, thinking)
    kept, dropped = Counter(), Counter()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        for example in stream:
            length = len(tokenise(example.item(), vocabulary, example.skill).tokens)
            (kept if length <= tokens else dropped)[example.skill] += 1
            if length <= tokens:
                file.write(json.dumps(example.item(), ensure_ascii=False) + "\n")
            if kept.total() == count:
                break
            if kept.total() % EVERY == 0 and length <= tokens:
                progress(f"{kept.total()}/{count} chats")
            if dropped.total() > 1000 + 20 * kept.total():
                raise ValueError(f"tokens={tokens} is too short for {', '.join(dropped)}")
    parts = ", ".join(f"{name} {n}" for name, n in sorted(kept.items()))
    return f"{out}: {count} chats ({parts}); {dropped.total()} were too long"


def write_tokenizer(
    out: str,
    texts: str | None,
    size: int,
    seed: int,
    progress: Callable[[str], None] = print,
) -> str:
    """Learns a tokenizer from chats of every skill and natural text; writes `tokenizer.json`.

    Raises:
        ValueError: see `train_tokenizer` and `read_texts`.
    """
    paragraphs = read_texts(texts) if texts else []
    progress(f"learning {size} tokens from {VOCABULARY_CHATS} chats and {len(paragraphs)} texts")
    found = train_tokenizer(_vocabulary_texts(seed, paragraphs), size)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    found.save(str(folder / "tokenizer.json"))
    return f"{folder / 'tokenizer.json'}: {found.get_vocab_size()} tokens"


def _vocabulary_texts(seed: int, paragraphs: list[list[str]]) -> Iterator[str]:
    """Chats as they are rendered, tool declarations included; every word of the skills; texts."""
    mix = dict.fromkeys(SKILLS, 1.0)
    for level in LEVELS:
        stream = examples(mix, seed, SPLITS[0], level, 256, lambda text: len(text) // 4, paragraphs)
        for example in islice(stream, VOCABULARY_CHATS // len(LEVELS)):
            yield from (s.text for s in render(example.item()) if not s.is_control)
    for group in (words.NAMES, words.COLOURS, words.ANIMALS, words.THINGS, words.CITIES):
        for word in group:
            yield from (word, f" {word}") * WORD_WEIGHT
    for work in paragraphs:
        yield from work
