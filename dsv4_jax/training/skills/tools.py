"""Tool calls: a calculator, look-up tables, chains of two calls, and tools that are not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dsv4_jax.training.skills import words
from dsv4_jax.training.skills.base import Example, Maker, assistant, user

ITEMS = (*words.THINGS, *words.ANIMALS)
OPERATIONS = {"+": ("plus", "added to"), "-": ("minus",), "*": ("times", "multiplied by")}


def declare(name: str, purpose: str, /, **parameters: str) -> dict[str, Any]:
    """A tool in OpenAI's form whose parameters are all texts: name to description."""
    fields = {k: {"type": "string", "description": v} for k, v in parameters.items()}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    function = {"name": name, "description": purpose, "parameters": schema}
    return {"type": "function", "function": function}


CALCULATOR = declare("calculator", "Computes a result.", expression="Such as 12*34.")
PRICES = declare("price", "The price of an item.", item="Its name.")
STOCK = declare("stock", "How many of an item there are.", item="Its name.")
PHONE = declare("phone", "The phone number of a person.", name="Who.")
FRIEND = declare("friend", "The friend of a person.", name="Who.")
ABSENT = ("weather", "email", "camera", "map", "news", "calendar", "translator", "timer", "music")


def make_calculator(maker: Maker, thinking: bool) -> Example:
    """One call per question, some questions in a row."""
    talk, instances = _Talk(thinking), []
    for _ in range(maker.rng.randint(1, 3)):
        instance, (a, op, b) = maker.draw(lambda: _product(maker))
        instances.append(instance)
        ask = f"{a} {maker.choice(OPERATIONS[op])} {b}"
        talk.ask(maker.choice((f"What is {ask}?", f"Use the calculator: {ask}")))
        expression = f"{a}{op}{b}"
        result = calculate(expression)
        talk.call(f"I compute {expression}.", ("calculator", {"expression": expression}, result))
        talk.say(f"The result is {result}.", f"It is {result}.")
    tools = _shuffled(maker, CALCULATOR, maker.choice((PRICES, STOCK, PHONE, None)))
    return Example("tools: calculator", talk.messages, thinking, tuple(instances), tools)


def make_lookup(maker: Maker, thinking: bool) -> Example:
    """One call per question to one of several tables."""
    talk, instances, tables = _Talk(thinking), [], {}
    kinds = {"price": PRICES, "stock": STOCK, "phone": PHONE}
    for _ in range(maker.rng.randint(1, 3)):
        kind = maker.choice(list(kinds))
        field = "name" if kind == "phone" else "item"
        instance, (key, value) = maker.draw(lambda k=kind: _entry(maker, k))
        if key in tables.get(kind, {}):
            continue
        instances.append(instance)
        tables.setdefault(kind, {})[key] = value
        talk.ask(maker.choice(_LOOKUP_ASKS[kind]).format(key))
        talk.call(f"I look up the {kind} of {key}.", (kind, {field: key}, value))
        talk.say(f"The {kind} of {key} is {value}.", f"It is {value}.")
    tools = _shuffled(maker, *kinds.values())
    return Example("tools: look-up", talk.messages, thinking, tuple(instances), tools, tables)


def make_chain(maker: Maker, thinking: bool) -> Example:
    """Two calls, the second made of the first one's result."""
    return (_cost if maker.rng.random() < 0.5 else _phone_of_friend)(maker, thinking)


def _cost(maker: Maker, thinking: bool) -> Example:
    talk = _Talk(thinking)
    instance, (item, price) = maker.draw(lambda: _entry(maker, "price"))
    count = maker.rng.randint(2, 99)
    talk.ask(f"What do {count} of {item} cost?")
    talk.call(f"I look up the price of {item}.", ("price", {"item": item}, price))
    expression = f"{count}*{price}"
    total = calculate(expression)
    talk.call(f"I compute {expression}.", ("calculator", {"expression": expression}, total))
    talk.say(f"{count} of {item} cost {total}.", f"It is {total}.")
    tools = _shuffled(maker, PRICES, CALCULATOR)
    tables = {"price": {item: price}}
    return Example("tools: chain", talk.messages, thinking, (instance,), tools, tables)


def _phone_of_friend(maker: Maker, thinking: bool) -> Example:
    talk = _Talk(thinking)
    one = maker.choice(words.NAMES)
    instance, (other, number) = maker.draw(lambda: _entry(maker, "phone"))
    talk.ask(f"What is the phone number of the friend of {one}?")
    talk.call(f"I look up the friend of {one}.", ("friend", {"name": one}, other))
    talk.call(f"I look up the phone of {other}.", ("phone", {"name": other}, number))
    talk.say(f"The phone of {other} is {number}.", f"It is {number}.")
    tools = _shuffled(maker, FRIEND, PHONE)
    tables = {"friend": {one: other}, "phone": {other: number}}
    return Example("tools: chain", talk.messages, thinking, (instance,), tools, tables)


def make_refusal(maker: Maker, thinking: bool) -> Example:
    """A tool is asked for that is not among the declared ones."""
    talk = _Talk(thinking)
    name = maker.choice(ABSENT)
    instance, who = maker.draw(lambda: _absent(maker, name))
    talk.ask(f"Use the {name} tool for {who}.")
    talk.say(f"I have no {name} tool.", f"There is no {name} tool.")
    tools = _shuffled(maker, *maker.rng.sample((CALCULATOR, PRICES, STOCK, PHONE, FRIEND), 2))
    return Example("tools: refusal", talk.messages, thinking, (instance,), tools)


def calculate(expression: str) -> str:
    """The value of `a+b`, `a-b` or `a*b` of whole numbers.

    Raises:
        ValueError: the expression is not of this form.
    """
    for op in "+*-":
        left, found, right = expression.replace(" ", "").partition(op)
        if found and left.isdigit() and right.isdigit():
            a, b = int(left), int(right)
            return str(a + b if op == "+" else a - b if op == "-" else a * b)
    raise ValueError(f"{expression!r} must look like 12+34, 34-12 or 12*34")


def answer(name: str, arguments: Mapping[str, Any], tables: Mapping[str, Mapping[str, str]]) -> str:
    """What a tool says to a call; what it cannot do begins with "error"."""
    if name == "calculator":
        try:
            return calculate(str(arguments.get("expression", "")))
        except ValueError as error:
            return f"error: {error}"
    keys = [str(value) for value in arguments.values()]
    if len(keys) != 1 or keys[0] not in tables.get(name, {}):
        return f"error: {name} knows nothing of {', '.join(keys)}"
    return tables[name][keys[0]]


_LOOKUP_ASKS = {
    "price": ("What is the price of {}?", "How much is {}?", "price of {}"),
    "stock": ("How many of {} are there?", "What is the stock of {}?"),
    "phone": ("What is the phone number of {}?", "phone of {}"),
}


class _Talk:
    """Writes a conversation with tools; reasoning only when thinking."""

    def __init__(self, thinking: bool) -> None:
        self.messages: list[dict[str, Any]] = []
        self.thinking = thinking
        self._calls = 0

    def ask(self, text: str) -> None:
        self.messages.append(user(text))

    def call(self, reasoning: str, call: tuple[str, dict[str, str], str]) -> None:
        name, arguments, result = call
        self._calls += 1
        which = f"call_{self._calls}"
        function = {"name": name, "arguments": json.dumps(arguments)}
        made = {"id": which, "type": "function", "function": function}
        turn = assistant("", reasoning if self.thinking else "") | {"tool_calls": [made]}
        self.messages += [turn, {"role": "tool", "tool_call_id": which, "content": result}]

    def say(self, text: str, reasoning: str) -> None:
        self.messages.append(assistant(text, reasoning if self.thinking else ""))


def _shuffled(maker: Maker, *tools: dict[str, Any] | None) -> list[dict[str, Any]]:
    found = [tool for tool in tools if tool is not None]
    maker.rng.shuffle(found)
    return found


def _product(maker: Maker) -> tuple[str, tuple[int, str, int]]:
    a, b = (maker.rng.randint(2, 10 ** maker.rng.randint(1, 4)) for _ in range(2))
    op = maker.choice(list(OPERATIONS))
    return f"call {a}{op}{b}", (a, op, b)


def _entry(maker: Maker, kind: str) -> tuple[str, tuple[str, str]]:
    key = maker.choice(words.NAMES if kind == "phone" else ITEMS)
    value = str(maker.rng.randint(2, 99999 if kind == "phone" else 999))
    return f"{kind} {key} {value}", (key, value)


def _absent(maker: Maker, name: str) -> tuple[str, str]:
    who = maker.choice((*words.CITIES, *words.NAMES, *ITEMS))
    return f"absent {name} {who}", who
