"""Grammars that take too long: their request is refused, and others do not wait for it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from dsv4_jax.serving.constraints import Constrainer
from dsv4_jax.serving.grammar import GrammarCompiler
from dsv4_jax.serving.grammar.pool import Pool, TooSlow
from tests.serving.fakes import PATIENCE_S, FakeModel, chat_answer, make_service, tokenizer
from tests.serving.live import serving

SHORT_S = 0.05
ASK = {"messages": [{"role": "user", "content": "q"}], "thinking": {"type": "disabled"}}


def form(word: str) -> dict:
    return {"response_format": {"type": "regex", "regex": word}}


def tools(word: str, strict: bool) -> dict:
    schema = {"type": "object", "properties": {word: {"type": "integer"}}}
    function = {"name": "f", "parameters": schema, "strict": strict}
    return {"tools": [{"type": "function", "function": function}]}


def test_work_within_the_limit_is_done_and_its_errors_pass():
    pool = Pool(PATIENCE_S)
    assert pool.run(lambda is_late: is_late()) is False
    with pytest.raises(ZeroDivisionError):
        pool.run(lambda _: 1 / 0)


def test_late_work_is_left_behind_and_told():
    pool, told, gate = Pool(SHORT_S, threads=1), [], threading.Event()

    def late(is_late) -> None:
        assert gate.wait(PATIENCE_S)
        told.append(is_late())

    with pytest.raises(TooSlow):
        pool.run(late)
    with pytest.raises(TooSlow):  # no thread is free
        pool.run(lambda _: told.append("never"))
    gate.set()
    pool.limit_s = PATIENCE_S
    assert pool.run(lambda _: 5) == 5
    assert told == [True]


def test_waiting_for_a_turn_does_not_count_against_the_work():
    pool, gate, begun = Pool(PATIENCE_S, threads=1), threading.Event(), threading.Event()

    def first(_) -> None:
        begun.set()
        assert gate.wait(PATIENCE_S)

    with ThreadPoolExecutor(2) as clients:
        one = clients.submit(pool.run, first)
        assert begun.wait(PATIENCE_S)
        other = clients.submit(pool.run, lambda _: 7)
        gate.set()
        assert (one.result(), other.result()) == (None, 7)


@pytest.fixture
def gate(monkeypatch):
    """Grammars that name `slow` are made once the gate opens; begun ones are counted."""
    gate, begun = threading.Event(), threading.Semaphore(0)
    make = GrammarCompiler._compiled

    def slowly(self, rules: str, param: str):
        if "slow" in rules:
            begun.release()
            assert gate.wait(PATIENCE_S)
        return make(self, rules, param)

    monkeypatch.setattr(GrammarCompiler, "_compiled", slowly)
    yield gate, begun
    gate.set()


def test_a_form_that_takes_too_long_is_refused_and_others_go_on(gate):
    is_open, begun = gate
    service = make_service(FakeModel(chat_answer("ok")), parallel=8)
    constrainer = Constrainer(GrammarCompiler(tokenizer()), pool := Pool(PATIENCE_S))
    service.loaded().planner._constrainer = constrainer
    with serving(service) as address, ThreadPoolExecutor(2) as clients:

        def ask(more: dict) -> httpx.Response:
            return httpx.post(f"{address}/v1/chat/completions", json=ASK | more, timeout=PATIENCE_S)

        waiting = [clients.submit(ask, form(f"slow{i}")) for i in range(2)]
        assert all(begun.acquire(timeout=PATIENCE_S) for _ in waiting)
        assert ask({}).status_code == 200  # though every thread for grammars is taken
        is_open.set()
        assert [job.result().status_code for job in waiting] == [200, 200]
        is_open.clear()
        pool.limit_s = SHORT_S
        late = [ask(form("slow3")), ask(tools("slow4", strict=True))]
        late.append(ask(tools("slow5", strict=False) | {"tool_choice": "required"}))
        for reply, param in zip(late, ("response_format", "tools", "tools"), strict=True):
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (
                400,
                "invalid_schema",
                param,
            )
            assert "takes more than" in error["message"]
        assert ask(tools("slow6", strict=False)).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200
        is_open.set()
        pool.limit_s = PATIENCE_S
        assert ask(form("ok")).json()["choices"][0]["message"]["content"] == "ok"
        assert ask(form("slow3")).status_code == 200
