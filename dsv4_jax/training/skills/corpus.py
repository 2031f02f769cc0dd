"""A stream of examples: skills in shares, two modes, one seed, one split."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from dsv4_jax.training.skills import arithmetic, retrieval, sequences, talk, tools
from dsv4_jax.training.skills.base import SPLITS, Example, Maker
from dsv4_jax.training.skills.filler import Filler

SKILLS: dict[str, Callable[[Maker, bool], Example]] = {
    "arithmetic": arithmetic.make,
    "retrieval": retrieval.make,
    "alike": retrieval.make_alike,
    "quiz": retrieval.make_quiz,
    "needles": retrieval.make_many,
    "hops": retrieval.make_hops,
    "copy": sequences.make_copy,
    "reverse": sequences.make_reverse,
    "sort": sequences.make_sort,
    "count": sequences.make_count,
    "calculator": tools.make_calculator,
    "lookup": tools.make_lookup,
    "chain": tools.make_chain,
    "refusal": tools.make_refusal,
    "talk": talk.make,
    "small": talk.make_small,
    "text": retrieval.make_text,
}
LEVELS = (0, 1, 2, 3)


def examples(
    mix: Mapping[str, float],
    seed: int,
    split: str,
    level: int,
    tokens: int,
    count: Callable[[str], int],
    texts: Sequence[Sequence[str]] = (),
    thinking: float = 0.4,
) -> Iterator[Example]:
    """Endless examples.

    mix: skills and their shares. level: 0 (shortest lists, smallest numbers) to 3. tokens: about
    the longest document. count: tokens of a text. thinking: share of the examples that reason.

    Raises:
        ValueError: an unknown skill, split or level, or no skill at all.
    """
    if unknown := set(mix) - set(SKILLS):
        raise ValueError(f"unknown skills {', '.join(sorted(unknown))}: choose {', '.join(SKILLS)}")
    if not any(mix.values()) or min(mix.values()) < 0:
        raise ValueError(f"mix={dict(mix)} needs shares that are not negative, and one above 0")
    if split not in SPLITS or level not in LEVELS:
        raise ValueError(f"split={split!r}, level={level}: must be one of {SPLITS} and {LEVELS}")
    rng = random.Random(f"{seed} {split} {level} {tokens}")
    maker = Maker(rng, split, level, tokens, Filler(rng, split, count, texts))
    return _stream(maker, list(mix), list(mix.values()), thinking)


def _stream(maker: Maker, names: list[str], shares: list[float], thinking: float):
    while True:
        name = maker.rng.choices(names, shares)[0]
        yield SKILLS[name](maker, maker.rng.random() < thinking)
