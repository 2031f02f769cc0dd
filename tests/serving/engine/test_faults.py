"""What goes wrong costs as few requests as possible, and is said."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax import presets
from dsv4_jax.model import init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine import loop
from dsv4_jax.serving.engine.compiles import compiled_here
from dsv4_jax.serving.engine.device import FAILED
from dsv4_jax.serving.engine.loop import Engine, EngineError, EngineFull
from dsv4_jax.serving.engine.sizing import plan_sizes
from dsv4_jax.serving.engine.watchdog import EngineStuck, Watchdog
from tests.serving.engine.conftest import metric, settled


def ask(engine, first: int, count: int = 30) -> list[int]:
    stream = engine.stream([first, 7], SamplingParams(count, seed=first), frozenset())
    return [token.id for token in stream]


@pytest.fixture
def rig(engine, monkeypatch):
    """Lets a test put itself between the engine and its device."""

    def replace(function) -> None:
        run = engine.runner.run
        monkeypatch.setattr(engine.runner, "run", lambda plan: function(run, plan))

    return replace


def test_numbers_that_are_not_finite_end_their_request_only(engine, rig):
    alone = ask(engine, 5)

    def poison(run, plan):
        launched = run(plan)
        for part in launched:
            for i, row in enumerate(part.rows):
                if row.request.prompt[0] == 6 and row.request.num_generated > 3:
                    tokens = part.sampled.tokens_BT.at[i].set(FAILED)
                    part.sampled = part.sampled._replace(tokens_BT=tokens)
        return launched

    jnp.zeros(3, jnp.int32).at[0].set(FAILED)  # compiled here, and again in the engine's thread
    before = metric(engine, "nan_logits_total")
    with monitored(engine):
        rig(poison)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(ask, engine, 5)
            with pytest.raises(EngineError, match="error") as caught:
                ask(engine, 6)
            assert "NaN" in str(caught.value.__cause__)
            assert other.result() == alone
    assert metric(engine, "nan_logits_total") > before


class monitored:
    """Forgives the compilations of a test that computes in the engine's thread."""

    def __init__(self, engine) -> None:
        self.metrics = engine.metrics

    def __enter__(self) -> None:
        self.count, self.metrics.count = self.metrics.count, self._count

    def _count(self, name: str, amount: float = 1, **labels: str) -> None:
        if name != "compilations_after_ready":
            self.count(name, amount, **labels)

    def __exit__(self, *_) -> None:
        self.metrics.count = self.count


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_fails_ends_its_requests_only(engine, rig, when):
    alone = ask(engine, 5)
    failures = iter([True])

    def fail_once(run, plan):
        is_mine = any(row.request.prompt[0] == 6 for row in plan.decode)
        fails = is_mine and next(failures, False)
        if fails and when == "before":
            raise RuntimeError("no step")
        launched = run(plan)
        if fails:
            raise RuntimeError("no results")
        return launched

    rig(fail_once)
    with pytest.raises(EngineError) as caught:
        ask(engine, 6)
    assert "no " in str(caught.value.__cause__)
    assert ask(engine, 5) == alone
    assert ask(engine, 6) and engine.failure is None
    with settled(engine):
        engine.scheduler.check()


def test_a_lost_state_stops_the_engine_and_says_so():
    engine = idle_engine()

    def lose(plan):
        engine.runner.state.last_S.delete()
        raise RuntimeError("out of memory")

    engine.runner.run = lose
    engine.start()
    with pytest.raises(EngineError) as caught:
        ask(engine, 5)
    assert "out of memory" in str(caught.value.__cause__)
    assert "out of memory" in str(engine.failure)
    with pytest.raises(EngineError, match="stopped"):
        ask(engine, 5)
    engine.stop()


def test_a_step_that_never_comes_back_ends_all_requests():
    engine, gate = idle_engine(), threading.Event()
    entered = threading.Event()

    def hang(plan):
        entered.set()
        gate.wait()
        return []

    engine.runner.run = hang
    engine.start()
    stream = engine.stream([5], SamplingParams(5), frozenset())
    waiting = engine.stream([6], SamplingParams(5), frozenset())
    assert entered.wait(60)
    assert engine._watchdog.limit_s == loop.STEP_TIMEOUT_S and not engine._watchdog.check()
    engine._watchdog.limit_s = 0
    assert engine._watchdog.check()
    for each in (stream, waiting):
        with pytest.raises(EngineError):
            next(each)
    assert isinstance(engine.failure, EngineStuck)
    gate.set()
    engine._thread.join()
    engine.stop()


def test_the_watchdog_lets_a_slow_step_pass():
    seen: list[EngineStuck] = []
    busy_s = [10.5, 10.0, 9.0, 0.0]
    dog = Watchdog(10, busy_s.pop, seen.append)
    assert [dog.check() for _ in range(4)] == [False, False, False, True]
    assert "10 s" in str(seen[0])


def test_draining_finishes_what_was_taken(engine):
    streams = [engine.stream([n + 3], SamplingParams(20, seed=n), frozenset()) for n in range(6)]
    engine.drain()
    try:
        with pytest.raises(EngineFull, match="draining"):
            engine.stream([3], SamplingParams(1), frozenset())
        assert [len(list(stream)) for stream in streams] == [20] * 6
    finally:
        engine.scheduler.draining = False


def test_compilations_are_counted_where_they_happen():
    counts = []

    def compile_something(power: int) -> None:
        jax.block_until_ready(jax.jit(lambda x: x**power)(1.0))
        counts.append(compiled_here())

    before = compiled_here()
    thread = threading.Thread(target=compile_something, args=(17,))
    thread.start()
    thread.join()
    assert counts[0] >= 1 and compiled_here() == before


def idle_engine() -> Engine:
    cfg = presets.tiny().replace(max_len=256)
    params = init_params(cfg, jax.random.key(0))
    return Engine(cfg, Numerics(), params, *plan_sizes(cfg, 256, 1))
