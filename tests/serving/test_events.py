"""Joining events for slow readers."""

from dsv4_jax.serving.events import Content, Reasoning, ToolArguments, ToolStart, merge


def test_neighbours_of_one_kind_join():
    events = [Reasoning("a"), Reasoning("b"), Content("c"), Content("d"), Reasoning("e")]
    assert merge(events) == [Reasoning("ab"), Content("cd"), Reasoning("e")]


def test_calls_stay_apart():
    first = [ToolStart(0, "f"), ToolArguments(0, "{"), ToolArguments(0, "}")]
    second = [ToolStart(1, "g"), ToolArguments(1, "{}")]
    joined = [ToolStart(0, "f"), ToolArguments(0, "{}"), *second]
    assert merge([*first, *second]) == joined
    assert merge([ToolArguments(0, "a"), ToolArguments(1, "b")]) == [
        ToolArguments(0, "a"),
        ToolArguments(1, "b"),
    ]


def test_nothing():
    assert merge([]) == []
