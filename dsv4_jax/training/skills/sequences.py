"""Copy, reverse, sort and count over short lists."""

from __future__ import annotations

from collections.abc import Callable

from dsv4_jax.training.skills import words
from dsv4_jax.training.skills.base import Example, Maker, assistant, user

POOL = (*words.ANIMALS, *words.THINGS, *words.COLOURS)
SIZES = ((2, 6), (2, 10), (2, 16), (2, 24))  # items by level


def make_copy(maker: Maker, thinking: bool) -> Example:
    asks = ("Copy:\n{}", "Repeat this exactly:\n{}", "Say it again:\n{}")
    return _several(maker, "copy", thinking, asks, _listed, _any_items)


def make_reverse(maker: Maker, thinking: bool) -> Example:
    asks = ("Reverse: {}", "Write in reverse order: {}", "Say it backwards: {}")
    return _several(maker, "reverse", thinking, asks, _reversed, _any_items)


def make_sort(maker: Maker, thinking: bool) -> Example:
    asks = ("Sort: {}", "Put in ascending order: {}")
    return _several(maker, "sort", thinking, asks, _sorted, _ranked)


def make_count(maker: Maker, thinking: bool) -> Example:
    """How often one item occurs in a list."""
    messages, instances = [], []
    for _ in range(1 if thinking else maker.rng.randint(2, 4)):
        instance, (items, wanted) = maker.draw(lambda: _countable(maker))
        text = " ".join(items)
        ask = maker.choice(("How many times does {} occur in: {}", "Count {} in: {}"))
        hits = [i for i in items if i == wanted]
        steps = " ".join(f"{item} {n}" for n, item in enumerate(hits, start=1)) or "none"
        answer = assistant(str(len(hits)), steps if thinking else "")
        messages += [user(ask.format(wanted, text)), answer]
        instances.append(instance)
    return Example("count", messages, thinking, tuple(instances))


def _several(
    maker: Maker,
    skill: str,
    thinking: bool,
    asks: tuple[str, ...],
    solve: Callable[[list[str]], str],
    items_of: Callable[[Maker], list[str]],
) -> Example:
    """One list in thinking mode, where the reasoning numbers the items; several without."""
    messages, instances = [], []
    for _ in range(1 if thinking else maker.rng.randint(2, 4)):

        def one() -> tuple[str, list[str]]:
            items = items_of(maker)
            return f"{skill} {' '.join(items)}", items

        instance, items = maker.draw(one)
        answer = solve(items)
        steps = " ".join(f"{n} {item}" for n, item in enumerate(items, start=1))
        messages += [
            user(maker.choice(asks).format(" ".join(items))),
            assistant(answer, steps if thinking else ""),
        ]
        instances.append(instance)
    return Example(skill, messages, thinking, tuple(instances))


def _listed(items: list[str]) -> str:
    return " ".join(items)


def _reversed(items: list[str]) -> str:
    """With a word in front, so that the first item is spelt as inside the list."""
    return f"Reversed: {' '.join(items[::-1])}"


def _sorted(items: list[str]) -> str:
    return f"Sorted: {' '.join(sorted(items, key=_rank))}"


def _any_items(maker: Maker) -> list[str]:
    rng = maker.rng
    count = rng.randint(*SIZES[maker.level])
    kind = rng.random()
    if kind < 0.6:
        return [rng.choice(POOL) for _ in range(count)]
    if kind < 0.8:
        return [str(rng.randint(0, 99)) for _ in range(count)]
    return [rng.choice((*words.LETTERS, *POOL, *words.NAMES)) for _ in range(count)]


def _ranked(maker: Maker) -> list[str]:
    rng = maker.rng
    count = rng.randint(2, min(SIZES[maker.level][1], 10))
    if rng.random() < 0.5:
        return [str(rng.randint(0, 99)) for _ in range(count)]
    return [rng.choice(words.LETTERS) for _ in range(count)]


def _rank(item: str) -> tuple[int, str]:
    return (int(item), "") if item.isdigit() else (0, item)


def _countable(maker: Maker) -> tuple[str, tuple[list[str], str]]:
    rng = maker.rng
    few = rng.sample(POOL, rng.randint(2, 5))
    items = [rng.choice(few) for _ in range(rng.randint(*SIZES[min(maker.level, 2)]))]
    wanted = rng.choice(few)
    return f"count {wanted} {' '.join(items)}", (items, wanted)
