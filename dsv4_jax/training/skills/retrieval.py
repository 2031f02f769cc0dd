"""Finding what a document says: one or several keys at any depth, and facts that lead on."""

from __future__ import annotations

from dsv4_jax.training.skills import words
from dsv4_jax.training.skills.base import Example, Maker, assistant, user

THINGS = (*words.THINGS, *words.ANIMALS)
FACTS = {
    "code": "The code of {k} is {v}.",
    "number": "The number of {k} is {v}.",
    "place": "The place of {k} is {v}.",
    "colour": "The colour of {k} is {v}.",
    "owner": "The owner of {k} is {v}.",
}
ASK = (
    "What is the {f} of {k}?",
    "Which {f} does {k} have?",
    "{f} of {k}?",
    "Tell me the {f} of {k}.",
)
FACT_TOKENS = 12  # about
TURN_TOKENS = 22  # about: a question, its answer and what is between
MOST_TURNS = 8

Fact = tuple[str, str, str]  # field, key, value


def make(maker: Maker, thinking: bool) -> Example:
    """Facts in a document; questions about them, one a turn, or one when thinking."""
    rng = maker.rng
    room = _room(maker)
    most = max(min(room // FACT_TOKENS, 24), 2)
    count = rng.randint(2, most) if rng.random() < 0.7 else 1
    return _questions(maker, "retrieval", _facts(maker, count), room, thinking)


def make_alike(maker: Maker, thinking: bool) -> Example:
    """Facts whose keys share words, little between them, and questions about most of them."""
    room = _room(maker)
    count = maker.rng.randint(3, max(min(room // FACT_TOKENS, 32), 3))
    facts = _facts(maker, count, keys=_keys_alike(maker, count))
    return _questions(maker, "facts alike", facts, room, thinking)


def make_quiz(maker: Maker, thinking: bool) -> Example:
    """Documents of little but facts, and questions about as many of them as there is room for.

    Most of a chat's tokens are the document's, so many questions about one teach more per token.
    """
    rng, left = maker.rng, maker.tokens - 60
    room = rng.randint(min(80, left // 2), left // 2)
    count = max(int(room / FACT_TOKENS * rng.uniform(0.4, 1)), 2)
    keys = _keys_alike(maker, count) if rng.random() < 0.5 else None
    facts = _facts(maker, count, keys=keys)
    most = 1 if thinking else (maker.tokens - 60 - room) // TURN_TOKENS
    return _questions(maker, "quiz", facts, room, thinking, most)


def _keys_alike(maker: Maker, count: int) -> list[str]:
    rng = maker.rng
    colours, things = rng.sample(words.COLOURS, 3), rng.sample(THINGS, 2 + count // 3)
    keys = [f"the {colour} {thing}" for colour in colours for thing in things]
    return rng.sample(keys, 2 * len(keys) // 3) + rng.sample(words.NAMES, len(keys) // 3)


def _questions(
    maker: Maker, skill: str, facts: list[Fact], room: int, thinking: bool, turns: int = 0
) -> Example:
    """A document that tells facts, and questions about them, one a turn; one when thinking.

    turns: how many, if there are as many facts; 0 draws them.
    """
    rng = maker.rng
    turns = turns or (1 if thinking else rng.randint(1, MOST_TURNS))
    asked = rng.sample(facts, min(len(facts), turns))
    text = _document(maker, [_tell(f) for f in facts], room)
    messages = []
    for number, (field, key, value) in enumerate(asked):
        ask = maker.choice(ASK).format(f=field, k=key)
        asked_text = _ask_about(maker, text, ask) if number == 0 else ask
        reasoning = _tell((field, key, value)) if thinking else ""
        messages += [user(asked_text), assistant(f"It is {value}.", reasoning)]
    return Example(skill, messages, thinking, tuple(_instance(f) for f in facts))


def make_many(maker: Maker, thinking: bool) -> Example:
    """Several values asked for at once, answered in the order of the question."""
    rng = maker.rng
    room = _room(maker)
    count = rng.randint(3, max(min(room // FACT_TOKENS, 24), 3))
    field = rng.choice(list(FACTS))
    facts = _facts(maker, count, field)
    asked = rng.sample(facts, min(count, rng.randint(2, 5)))
    text = _document(maker, [_tell(f) for f in facts], room)
    ask = f"Give the {field} of {', '.join(key for _, key, _ in asked)}."
    answer = f"They are {', '.join(value for _, _, value in asked)}."
    reasoning = " ".join(_tell(f) for f in asked) if thinking else ""
    messages = [user(_ask_about(maker, text, ask)), assistant(answer, reasoning)]
    return Example("several needles", messages, thinking, tuple(_instance(f) for f in facts))


def make_hops(maker: Maker, thinking: bool) -> Example:
    """A fact about a person's friend: one sentence leads to the other."""
    rng = maker.rng
    room = _room(maker)
    pairs = rng.randint(1, max(min(room // (2 * FACT_TOKENS), 8), 1))
    people = rng.sample(words.NAMES, 2 * pairs)
    told, asked = [], []
    for one, other in zip(people[::2], people[1::2], strict=True):
        instance, value = maker.draw(lambda one=one, other=other: _hop(maker, one, other))
        told += [f"The friend of {one} is {other}.", f"The code of {other} is {value}."]
        asked.append((instance, one, other, value))
    rng.shuffle(told)
    text = _document(maker, told, room)
    messages = []
    for number, (_, one, other, value) in enumerate(asked[: 1 if thinking else 3]):
        ask = f"What is the code of the friend of {one}?"
        steps = f"The friend of {one} is {other}. The code of {other} is {value}."
        asked_text = _ask_about(maker, text, ask) if number == 0 else ask
        messages += [user(asked_text), assistant(f"It is {value}.", steps if thinking else "")]
    return Example("two hops", messages, thinking, tuple(i for i, *_ in asked))


def _hop(maker: Maker, one: str, other: str) -> tuple[str, str]:
    value = str(maker.rng.randint(10, 9999))
    return f"hop {one} {other} {value}", value


def _room(maker: Maker) -> int:
    """Tokens of a document: evenly over the doublings up to the length allowed."""
    low, high = 40, max(maker.tokens - 90, 41)
    return int(low * (high / low) ** maker.rng.random())


def _facts(
    maker: Maker, count: int, field: str | None = None, keys: list[str] | None = None
) -> list[Fact]:
    """Facts about different keys, at most as many as there are keys."""
    found: dict[str, Fact] = {}
    while len(found) < min(count, len(keys or range(count))):
        _, fact = maker.draw(lambda: _fact(maker, field, keys))
        found.setdefault(fact[1], fact)
    return list(found.values())


def _fact(maker: Maker, field: str | None, keys: list[str] | None) -> tuple[str, Fact]:
    rng = maker.rng
    field = field or rng.choice(list(FACTS))
    key = rng.choice(keys) if keys else _key(maker)
    value = {
        "code": lambda: str(rng.randint(10, 9999)),
        "number": lambda: str(rng.randint(10, 99)),
        "place": lambda: rng.choice(words.CITIES),
        "colour": lambda: rng.choice(words.COLOURS),
        "owner": lambda: rng.choice(words.NAMES),
    }[field]()
    fact = (field, key, value)
    return _instance(fact), fact


def _key(maker: Maker) -> str:
    if maker.rng.random() < 0.4:
        return maker.rng.choice(words.NAMES)
    return f"the {maker.rng.choice(words.COLOURS)} {maker.rng.choice(THINGS)}"


def _instance(fact: Fact) -> str:
    return "fact " + "|".join(fact)


def _tell(fact: Fact) -> str:
    field, key, value = fact
    return FACTS[field].format(k=key, v=value)


def _document(maker: Maker, facts: list[str], room: int) -> str:
    """Facts in filler of about the tokens that are left, at random depths."""
    left = room - FACT_TOKENS * len(facts)
    lines = maker.filler(left) if left > 20 and maker.rng.random() < 0.8 else []
    for fact in facts:
        lines.insert(maker.rng.randint(0, len(lines)), fact)
    return "\n".join(lines)


def _ask_about(maker: Maker, text: str, ask: str) -> str:
    if maker.rng.random() < 0.3:
        return f"{ask}\n\n{text}"
    return f"{text}\n\n{ask}"


def make_text(maker: Maker, thinking: bool) -> Example:
    """Filler alone, learnt whole. Splits cut texts by paragraphs, so there is no instance."""
    del thinking
    return Example("text", [], text="\n".join(maker.filler(maker.tokens - 2)))
