"""Sums and differences of whole numbers: worked place by place when thinking, else at once."""

from __future__ import annotations

from dsv4_jax.training.skills.base import Example, Maker, assistant, user

PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands")
ASK = {
    "+": ("What is {a} + {b}?", "{a}+{b}", "{a} + {b} =", "Add {a} and {b}.", "Compute {a}+{b}."),
    "-": ("What is {a} - {b}?", "{a}-{b}", "{a} - {b} =", "Compute {a}-{b}."),
}


def make(maker: Maker, thinking: bool) -> Example:
    """One problem in thinking mode; several, one a turn, without."""
    messages, instances = [], []
    for _ in range(1 if thinking else maker.rng.randint(2, 5)):
        instance, (a, op, b) = maker.draw(lambda: _problem(maker))
        instances.append(instance)
        result = a + b if op == "+" else a - b
        text = maker.choice(ASK[op]).format(a=a, b=b)
        messages += [user(text), assistant(str(result), work(a, op, b) if thinking else "")]
    return Example("arithmetic", messages, thinking, tuple(instances))


def _problem(maker: Maker) -> tuple[str, tuple[int, str, int]]:
    digits = maker.rng.randint(1, min(2 + maker.level, 4))
    other = digits if maker.rng.random() < 0.7 else maker.rng.randint(1, digits)
    a, b = (maker.rng.randint(10 ** (n - 1), 10**n - 1) for n in (digits, other))
    op = "+" if maker.rng.random() < 0.65 else "-"
    if op == "-" or maker.rng.random() < 0.5:
        a, b = max(a, b), min(a, b)
    return f"{a} {op} {b}", (a, op, b)


def work(a: int, op: str, b: int) -> str:
    """The written method, lowest place first, for a ≥ b in differences."""
    return _sum(a, b) if op == "+" else _difference(a, b)


def _digits(a: int, b: int) -> list[tuple[str, int, int]]:
    width = max(len(str(a)), len(str(b)))
    return [(PLACES[i], a // 10**i % 10, b // 10**i % 10) for i in range(width)]


def _sum(a: int, b: int) -> str:
    lines, carry = [f"{a} + {b}"], 0
    for place, x, y in _digits(a, b):
        total = x + y + carry
        lines.append(f"{place}: {x}+{y}+{carry}={total}, write {total % 10} carry {total // 10}")
        carry = total // 10
    return "\n".join([*lines, f"last carry {carry}, so {a + b}"])


def _difference(a: int, b: int) -> str:
    lines, borrow = [f"{a} - {b}"], 0
    for place, x, y in _digits(a, b):
        left = x - y - borrow
        took = int(left < 0)
        lines.append(f"{place}: {x}-{y}-{borrow}={left}, write {left % 10} borrow {took}")
        borrow = took
    return "\n".join([*lines, f"so {a - b}"])
