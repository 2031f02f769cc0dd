"""Small talk, and remembering what was said some turns ago."""

from __future__ import annotations

from dsv4_jax.training.skills import words
from dsv4_jax.training.skills.base import Example, Maker, assistant, user

SMALL = (
    (("Hello!", "Hi!", "Hello", "Hi", "Good morning!", "Hey!"), "Hello! How can I help?"),
    (("How are you?", "How do you do?"), "I am fine, thank you. How can I help?"),
    (("Thank you!", "Thanks!", "Thanks a lot!"), "You are welcome."),
    (("Bye!", "Goodbye!", "See you!"), "Goodbye!"),
    (
        ("What can you do?", "Help", "What are you good at?"),
        "I can add and subtract, find facts in a text, copy, reverse, sort and count lists, and "
        "call tools.",
    ),
    (("Who are you?", "What are you?"), "I am a small demonstration model."),
)
TOLD = {
    "name": ("My name is {}.", words.NAMES, "What is my name?", "Your name is {}."),
    "city": ("I live in {}.", words.CITIES, "Where do I live?", "You live in {}."),
    "pet": ("I have a pet {}.", words.ANIMALS, "Which pet do I have?", "You have a pet {}."),
    "colour": ("I like {}.", words.COLOURS, "Which colour do I like?", "You like {}."),
    "number": (
        "My number is {}.",
        tuple(map(str, range(10, 1000))),
        "What is my number?",
        "Your number is {}.",
    ),
}


def make(maker: Maker, thinking: bool) -> Example:
    """Greetings around facts about the user, which are asked for later."""
    rng = maker.rng
    instance, facts = maker.draw(lambda: _facts(maker))
    messages, questions = [], []
    for kind, value in facts.items():
        tell, _, ask, reply = TOLD[kind]
        messages += [user(tell.format(value)), assistant("I will remember that.")]
        questions.append((ask, reply.format(value)))
        if rng.random() < 0.4:
            asks, small = maker.choice(SMALL)
            messages += [user(maker.choice(asks)), assistant(small)]
    rng.shuffle(questions)
    for ask, reply in questions:
        messages += [user(ask), assistant(reply)]
    if thinking:  # what is rendered of earlier answers has no reasoning; the last one has
        last = messages[-1]["content"]
        messages[-1] = assistant(last, f"The user said so before: {last}")
    return Example("talk", messages, thinking, (instance,))


def make_small(maker: Maker, thinking: bool) -> Example:
    """Greetings alone. There are too few to hold any out: not scored, the same in both splits."""
    messages = []
    for _ in range(1 if thinking else maker.rng.randint(1, 4)):
        asks, reply = maker.choice(SMALL)
        messages += [user(maker.choice(asks)), assistant(reply, "Small talk." if thinking else "")]
    return Example("small talk", messages, thinking)


def _facts(maker: Maker) -> tuple[str, dict[str, str]]:
    """Facts of different kinds; together they are one instance, for some kinds have few values."""
    kinds = maker.rng.sample(list(TOLD), maker.rng.randint(1, 4))
    facts = {kind: maker.choice(TOLD[kind][1]) for kind in kinds}
    return f"told {sorted(facts.items())}", facts
