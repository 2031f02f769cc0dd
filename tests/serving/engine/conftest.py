"""One real engine for all tests of this folder: what takes long is to compile it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsv4_jax import presets
from dsv4_jax.model import init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.serving.engine.loop import Engine
from dsv4_jax.serving.engine.sizing import plan_sizes

MAX_LEN, SLOTS = 1024, 3


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    cfg, num = presets.tiny().replace(max_len=MAX_LEN), Numerics()
    # bound to a device, as those of a checkpoint are: else nothing shows what that compiles again
    params = jax.device_put(init_params(cfg, jax.random.key(0)), jax.devices()[0])
    scheduling, sizes = plan_sizes(cfg, MAX_LEN, slots=SLOTS, cache_tokens=5 * MAX_LEN)
    scheduling = replace(scheduling, reserve_tokens=1)  # so that pages can run out
    engine = Engine(cfg, num, params, scheduling, sizes, "test", host_cache_bytes=64 << 20)
    engine.test_config = cfg  # pyright: ignore[reportAttributeAccessIssue]
    told: list[tuple[int, int]] = []
    engine.warm_up(lambda done, total: told.append((done, total)))
    assert told == [(done, told[-1][1]) for done in range(len(told))] and told[-1][0]
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(autouse=True)
def left_in_order(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that used the engine, nothing is held and nothing was compiled."""
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        with settled(engine):
            engine.scheduler.check()
            assert engine.failure is None
            assert not engine.scheduler.slots.live
        assert metric(engine, "compilations_after_ready_total") == 0


@contextmanager
def settled(engine: Engine) -> Iterator[None]:
    """Holds the engine still once it has nothing left to do."""
    while True:
        with engine._lock:
            if not engine.scheduler.has_work:
                yield
                return
        threading.Event().wait(0.01)


def metric(engine: Engine, name: str) -> float:
    """Sum of a metric over its labels."""
    families = text_string_to_metric_families(engine.metrics.text().decode())
    samples = [sample for family in families for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == f"dsv4:{name}")


def forget_prefixes(engine: Engine, host_too: bool = True) -> None:
    """Empties the prefix cache, so that the next request is computed from its first token."""
    with settled(engine):
        engine.scheduler.cache.flush()
        if host_too:
            engine.host.clear()


@contextmanager
def little_room(engine: Engine, pages: int) -> Iterator[None]:
    """Leaves the engine so many pages."""
    with settled(engine):
        engine.scheduler.cache.flush()
        taken = engine.pages.allocate(engine.pages.num_free - pages)
    yield
    with settled(engine):
        for page in taken:
            engine.pages.release(page)
