"""A wall clock that jumps: nothing here measures time by it."""

import ast
import threading
import time
from pathlib import Path

import httpx
import pytest

import dsv4_jax.serving
from dsv4_jax.serving.engine.request import FinishReason, Request
from dsv4_jax.serving.engine.waiting import QueueLimits
from tests.serving.engine.harness import Engine, prompt, small_config
from tests.serving.fakes import PATIENCE_S, FakeModel, answer, make_service
from tests.serving.live import serving

HOURS_S = 6 * 3600.0
WALL = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}


def wall_clock_reads(path: Path) -> list[str]:
    """Calls of `time.time` and its like, but for time stamps, which are whole seconds."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    stamps = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "int"
        and node.args
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            is_clock = owner.split(".")[-1] in ("time", "datetime", "date")
            if is_clock and node.func.attr in WALL and id(node) not in stamps:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_durations_are_not_taken_from_the_wall_clock():
    root = Path(dsv4_jax.serving.__file__).parent
    assert [read for path in root.rglob("*.py") for read in wall_clock_reads(path)] == []


@pytest.fixture
def jumping(monkeypatch):
    """Makes the wall clock go back and forth by hours, a jump at every look."""
    real, jumps = time.time, []

    def jump() -> float:
        jumps.append(HOURS_S if len(jumps) % 2 else -HOURS_S)
        return real() + jumps[-1]

    monkeypatch.setattr(time, "time", jump)
    return jumps


def test_a_server_goes_on(jumping):
    gate = threading.Semaphore(0)
    model = FakeModel(answer("done"), gate=gate)
    service = make_service(model, keep_alive_s=3600.0, hold_headers_s=3600.0, body_timeout_s=3600.0)
    ask = {"messages": [{"role": "user", "content": "q"}]}
    with serving(service, stall_timeout_s=3600.0) as address:
        replies = []

        def stream() -> None:
            path = f"{address}/v1/chat/completions"
            replies.append(httpx.post(path, json=ask | {"stream": True}, timeout=PATIENCE_S).text)

        running = threading.Thread(target=stream)
        running.start()
        assert model.started.wait(PATIENCE_S)
        for _ in range(4):
            time.time()
            gate.release()
            assert httpx.get(f"{address}/health").status_code == 200
            assert httpx.get(f"{address}/ready").status_code == 200
        gate.release(100)
        running.join(PATIENCE_S)
        whole = httpx.post(f"{address}/v1/chat/completions", json=ask).json()
    assert len(jumping) >= 4
    assert '"finish_reason":"stop"' in replies[0] and ": keep-alive" not in replies[0]
    assert whole["choices"][0]["message"]["content"] == "done"


def test_waiting_is_measured_by_the_engine_s_own_clock(jumping):
    engine = Engine(small_config(num_slots=1, queue=QueueLimits(timeout_s=100)))
    engine.submit(*(Request(str(n), prompt(100), max_tokens=5) for n in range(4)))
    while engine.scheduler.has_work:
        time.time()
        engine.step(seconds=1)
    assert {r.finish_reason for r in engine.finished} == {FinishReason.LENGTH}
    engine.check_idle()
