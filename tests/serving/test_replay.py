"""Answers that called tools come back into prompts as the model said them."""

import json
from array import array
from typing import Any

import pytest
from starlette.testclient import TestClient

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.api import create_app
from dsv4_jax.serving.engine.blobs import BlobStore
from dsv4_jax.serving.replay import ReplayStore, Said
from tests.serving.completions import block, invoke, json_parameter, text_parameter
from tests.serving.fakes import FakeModel, answer, chat_answer, counted, ids, make_service

TOOLS = [{"type": "function", "function": {"name": "f"}}]
USER = {"role": "user", "content": "q"}
CALL = invoke("f", json_parameter("b", "[1,2.0]"), text_parameter("a", "x"))
SAYS = answer(f"Look.\n\n{block(CALL)}", reasoning="because")
OFF: dict[str, Any] = {"thinking": {"type": "disabled"}}


class Talk:
    """A conversation of one call and its result."""

    def __init__(self, says: str = SAYS, first: dict[str, Any] | None = None, **settings: Any):
        self.model = FakeModel(says)
        self.client = TestClient(create_app(make_service(self.model, **settings)))
        self.message = self.ask([USER], **(first or {}))
        self.first = self.model.prompts[0]

    def ask(self, messages: list[Any], **fields: Any) -> dict[str, Any]:
        body = {"messages": messages, "tools": TOOLS, **fields}
        reply = self.client.post("/v1/chat/completions", json=body)
        return reply.json()["choices"][0]["message"]

    def second_prompt(self, message: dict[str, Any], **fields: Any) -> list[int]:
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "R"}
        before = len(self.model.prompts)
        self.ask([USER, message, result], **fields)
        return self.model.prompts[before]

    def is_spliced(self, prompt: list[int], says: str = SAYS) -> bool:
        begun = self.first + ids(says)
        return prompt[: len(begun)] == begun


def without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k not in ("reasoning", "reasoning_content")}


def with_arguments(message: dict[str, Any], arguments: str) -> dict[str, Any]:
    (call,) = message["tool_calls"]
    call = {**call, "function": {**call["function"], "arguments": arguments}}
    return {**message, "tool_calls": [call]}


def test_an_answer_comes_back_to_the_token():
    talk = Talk()
    assert talk.is_spliced(talk.second_prompt(talk.message))
    text = talk.client.get("/metrics").text
    assert counted(text, "dsv4:reasoning_restored_total") == 1


def test_dropped_reasoning_is_restored():
    talk = Talk()
    assert talk.is_spliced(talk.second_prompt(without_reasoning(talk.message)))


def test_reordered_arguments_are_the_same():
    talk = Talk()
    arguments = json.loads(talk.message["tool_calls"][0]["function"]["arguments"])
    other = json.dumps(dict(sorted(arguments.items())), indent=1)
    assert talk.is_spliced(talk.second_prompt(with_arguments(talk.message, other)))


def test_edited_answers_are_rendered_as_the_client_says():
    talk = Talk()
    edited = with_arguments(talk.message, '{"a": "y"}')
    assert not talk.is_spliced(talk.second_prompt(edited))
    for change in ({"content": "Other."}, {"reasoning_content": "no", "reasoning": "no"}):
        prompt = talk.second_prompt({**talk.message, **change})
        assert not talk.is_spliced(prompt)
        assert ids(next(iter(change.values())))[0] in prompt


def test_answers_in_chat_mode_come_back_too():
    says = chat_answer(block(CALL))
    talk = Talk(says, first=OFF)
    assert talk.is_spliced(talk.second_prompt(talk.message, **OFF), says)


def test_an_answer_does_not_come_back_into_another_mode():
    says = chat_answer(f"\n\n{block(CALL)}")
    talk = Talk(says, first=OFF)
    prompt = talk.second_prompt(talk.message)
    assert ids(C.THINK_START)[0] in prompt
    assert not talk.is_spliced(prompt, says)


def test_tenants_do_not_share():
    talk = Talk(first={"user": "one"})
    prompt = talk.second_prompt(without_reasoning(talk.message), user="two")
    assert not talk.is_spliced(prompt)
    assert bytes(ids("because")) not in bytes(min(i, 255) for i in prompt)
    assert talk.is_spliced(talk.second_prompt(without_reasoning(talk.message), user="one"))


def test_it_can_be_switched_off():
    talk = Talk(replay_tokens=0)
    assert not talk.is_spliced(talk.second_prompt(without_reasoning(talk.message)))


def test_answers_that_were_cut_off_are_not_kept():
    talk = Talk(first={"max_tokens": len(ids(SAYS)) - 1})
    assert not talk.is_spliced(talk.second_prompt(without_reasoning(talk.message)))


def said(tokens: int) -> Said:
    return Said(array("i", range(tokens)), True, "r", "", ())


def test_the_store_is_bounded_and_keeps_what_is_used():
    store = ReplayStore(100)
    for index in range(3):
        store.keep("t", [f"call_{index}"], said(40))
        store.find("t", ["call_0"])
    assert store.find("t", ["call_0"]) is not None
    assert store.find("t", ["call_1"]) is None
    assert store.find("t", ["call_2"]) is not None
    store.keep("t", ["call_9"], said(101))
    assert store.find("t", ["call_9"]) is None
    assert store.find("t", []) is None


@pytest.mark.parametrize("call_id", ["call_0", "call_1"])
def test_only_the_first_call_names_an_answer(call_id):
    store = ReplayStore(100)
    store.keep("t", ["call_0", "call_1"], said(4))
    assert (store.find("t", [call_id]) is None) == (call_id == "call_1")


def test_answers_outlive_the_process(tmp_path):
    said = Said(array("i", [5, 6]), True, "because", "Look.", (("f", '{"a": 1}'),))

    def opened(max_tokens: int = 100) -> tuple[ReplayStore, BlobStore]:
        store = ReplayStore(max_tokens)
        store.blobs = BlobStore(tmp_path, "model", 1 << 20)
        return store, store.blobs

    store, blobs = opened()
    store.keep("a", ["call_1"], said)
    blobs.close()
    store, blobs = opened()
    assert store.find("a", ["call_1"]) == said
    assert store.find("b", ["call_1"]) is None and store.find("a", ["call_2"]) is None
    [path] = tmp_path.glob("*/*/r-*")
    assert b"call_1" not in path.read_bytes()
    blobs.close()
    path.write_bytes(path.read_bytes()[:-1])
    store, blobs = opened()
    assert store.find("a", ["call_1"]) is None and not path.exists()
    blobs.close()
    store, blobs = opened(max_tokens=0)
    store.keep("a", ["call_1"], said)
    blobs.close()
    assert not list(tmp_path.glob("*/*/r-*"))
