"""One answer, without HTTP."""

import pytest

from dsv4_jax.serving.events import Finish, Reasoning, ToolStart
from dsv4_jax.serving.leader import Cancelled
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.rules import Rules
from dsv4_jax.serving.schema import read_chat_request
from dsv4_jax.serving.turn import MAX_STRAY_MARKERS, Turn
from tests.serving.completions import Parsed, block, invoke, text_parameter
from tests.serving.fakes import FakeModel, answer, chat_answer, controls_in, ids, tokenizer

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def take(model: FakeModel, loop_guard=False, **fields) -> tuple[Parsed, Finish, Turn]:
    body = {"messages": [{"role": "user", "content": "q"}], **fields}
    planner = Planner(tokenizer(), "official", model.max_len, Rules(loop_guard=loop_guard))
    turn = Turn(planner.plan(read_chat_request(body)), planner, model, lambda: False)
    parsed = Parsed()
    *events, finish = turn
    parsed.add(events)
    assert isinstance(finish, Finish)
    return parsed, finish, turn


def test_thinking_answer():
    parsed, finish, _ = take(FakeModel(answer("c", reasoning="r")))
    assert (parsed.reasoning, parsed.content) == ("r", "c")
    assert finish == Finish("stop", completion_tokens=4, reasoning_tokens=2)


def test_the_end_inside_reasoning_becomes_the_end_of_reasoning():
    model = FakeModel("I forgot<｜end▁of▁sentence｜>", chat_answer("so: yes"))
    parsed, finish, turn = take(model, max_tokens=100)
    assert (parsed.reasoning, parsed.content) == ("I forgot", "so: yes")
    assert finish == Finish("stop", completion_tokens=9 + 8, reasoning_tokens=9)
    assert turn.guards["closed_reasoning"] == 1
    assert model.prompts[1] == model.prompts[0] + ids("I forgot</think>")
    assert [s.max_tokens for s in model.sampling] == [100, 91]
    assert model.closed.is_set()


def test_a_spent_budget_closes_reasoning():
    model = FakeModel("0123456789", chat_answer("ok"))
    thinking = {"type": "enabled", "budget_tokens": 4}
    parsed, finish, _ = take(model, thinking=thinking)
    assert (parsed.reasoning, parsed.content) == ("0123", "ok")
    assert finish.reasoning_tokens == 5
    assert model.prompts[1][-5:] == ids("0123</think>")


def test_reasoning_that_is_closed_by_the_last_token_is_cut_off():
    model = FakeModel("abc<｜end▁of▁sentence｜>", "never")
    parsed, finish, _ = take(model, max_tokens=4)
    assert (parsed.reasoning, parsed.content, finish.reason) == ("abc", "", "length")
    assert len(model.prompts) == 1


def test_a_model_that_runs_out_of_context_is_cut_off():
    _, finish, _ = take(FakeModel("abc"))
    assert finish.reason == "length"


@pytest.mark.parametrize("stop", ["de", "cde", "c", "bcdef"])
def test_stop_strings_end_the_answer(stop):
    model = FakeModel(answer("abcdefg"))
    parsed, finish, _ = take(model, stop=stop)
    assert parsed.content == "abcdefg".partition(stop)[0]
    assert finish.reason == "stop"
    assert model.closed.is_set()
    assert model.streamed < len(ids(answer("abcdefg")))


def test_the_beginning_of_a_stop_string_is_not_lost():
    parsed, _, _ = take(FakeModel(answer("abc")), stop="cd")
    assert parsed.content == "abc"


def test_stop_strings_do_not_reach_into_calls():
    call = block(invoke("f", text_parameter("a", "STOP")))
    parsed, finish, _ = take(FakeModel(answer(f"S\n\n{call}")), stop="STOP", tools=TOOLS)
    assert (parsed.content, parsed.arguments) == ("S", ['{"a": "STOP"}'])
    assert finish.reason == "tool_calls"


def test_held_content_comes_before_the_call():
    body = {"messages": [{"role": "user", "content": "q"}], "tools": TOOLS, "stop": "SS"}
    model = FakeModel(answer("S" + block(invoke("f"))))
    planner = Planner(tokenizer(), "official", model.max_len)
    kinds = [
        type(event).__name__
        for event in Turn(planner.plan(read_chat_request(body)), planner, model, lambda: False)
    ]
    assert kinds.index("Content") < kinds.index("ToolStart")


def test_a_cut_off_call_is_length_and_stays_open():
    call = answer(block(invoke("f", text_parameter("a", "x" * 50))))
    parsed, finish, _ = take(FakeModel(call), tools=TOOLS, max_tokens=90)
    assert finish.reason == "length"
    assert parsed.arguments[0].startswith('{"a": "x')
    assert not parsed.arguments[0].endswith('"}')


def test_cancelling_closes_the_model():
    model = FakeModel(answer("abc"))
    planner = Planner(tokenizer(), "official", model.max_len)
    body = {"messages": [{"role": "user", "content": "q"}]}
    seen: list[object] = []
    turn = Turn(planner.plan(read_chat_request(body)), planner, model, lambda: len(seen) > 1)
    with pytest.raises(Cancelled):
        seen.extend(event for event in turn if not seen.append(event))
    assert model.closed.is_set()
    assert model.streamed < len(ids(answer("abc")))


def test_every_reply_is_free_of_control_tokens():
    noise = "<｜User｜>a｜DSML｜<think>b</think>c<｜Assistant｜>d<｜DSML｜x"
    parsed, _, _ = take(FakeModel(noise))
    assert not controls_in(parsed.reasoning + parsed.content)


def test_events_come_as_the_model_speaks():
    model = FakeModel(answer("ab", reasoning="r") + "never")
    planner = Planner(tokenizer(), "official", model.max_len)
    body = {"messages": [{"role": "user", "content": "q"}], "tools": TOOLS}
    events = iter(Turn(planner.plan(read_chat_request(body)), planner, model, lambda: False))
    assert next(events) == Reasoning("r")
    assert model.streamed == 1
    assert not any(isinstance(event, ToolStart) for event in events)


def test_reasoning_that_goes_in_circles_is_closed():
    says = "Wait, no. " * 300
    parsed, finish, turn = take(FakeModel(says, chat_answer("so")), loop_guard=True)
    assert parsed.content == "so"
    assert turn.guards["reasoning_loop"] == 1
    assert len(parsed.reasoning) < 200
    _, _, turn = take(FakeModel(says), max_tokens=500)
    assert not turn.guards


def test_reasoning_that_goes_on_is_left_alone():
    says = "".join(f"{i}, " for i in range(700)) + answer("x")
    _, _, turn = take(FakeModel(says), loop_guard=True)
    assert not turn.guards["reasoning_loop"]


def test_markers_that_open_nothing_interrupt_a_few_times_only():
    model = FakeModel(answer("a｜DSML｜b" * 20))
    parsed, _, turn = take(model, tools=TOOLS)
    assert parsed.content == "ab" * 20
    assert turn.guards["stray_marker"] == MAX_STRAY_MARKERS
    assert len(model.streams) == 1 + MAX_STRAY_MARKERS


def test_calls_that_have_begun_are_guided_and_the_text_before_is_not():
    model = FakeModel(answer("Look.\n\n" + block(invoke("nope"))))
    parsed, finish, turn = take(model, tools=TOOLS)
    assert (parsed.content, parsed.names, finish.reason) == ("Look.", ["f"], "tool_calls")
    assert [stream.given["guide"] is None for stream in model.streams] == [True, False]
    assert turn.guards["tool_grammar"] == 1
    assert all(stream.given["keep_output"] for stream in model.streams)


def test_nothing_follows_the_calls():
    model = FakeModel(answer(block(invoke("f")) + "more text"))
    parsed, finish, _ = take(model, tools=TOOLS)
    assert (parsed.content, finish.reason) == ("", "tool_calls")


def test_budgets_count_across_interruptions():
    parsed, finish, _ = take(FakeModel(answer(block(invoke("f")))), tools=TOOLS, max_tokens=30)
    assert (finish.reason, finish.completion_tokens) == ("length", 30)
