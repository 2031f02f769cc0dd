"""The engine on the device: every stream equals its solo run, whatever else is going on."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from dsv4_jax import presets
from dsv4_jax.model import init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.loop import Engine, EngineError
from dsv4_jax.serving.engine.sizing import memory_plan, page_for, plan_sizes
from tests.serving.engine.conftest import MAX_LEN, settled

NEW = 12


def prompts(seed: int) -> list[list[int]]:
    """Lengths around units and chunks; half of them share a long beginning."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, 300, 300).tolist()
    lengths = (1, 127, 128, 129, 255, 257, 300, 520)
    alone = [rng.integers(3, 300, n).tolist() for n in lengths]
    return alone + [shared + rng.integers(3, 300, n).tolist() for n in (1, 90, 130, 300)]


def settings(index: int) -> SamplingParams:
    if index % 3 == 0:
        return SamplingParams(NEW, temperature=0.0)
    top_p = 0.8 if index % 2 else 1.0
    return SamplingParams(NEW, temperature=1.0, top_p=top_p, top_k=index % 4 * 10, seed=index)


def run(engine, prompt, index):
    stream = engine.stream(prompt, settings(index), frozenset(), tenant=f"t{index % 2}")
    return [token.id for token in stream]


def test_streams_do_not_depend_on_company_or_cache(engine):
    batch = prompts(0)
    cold = [run(engine, prompt, i) for i, prompt in enumerate(batch)]
    hits = [run(engine, prompt, i) for i, prompt in enumerate(batch)]
    with ThreadPoolExecutor(len(batch)) as pool:
        together = list(pool.map(lambda i: run(engine, batch[i], i), range(len(batch))))
    assert all(len(tokens) == NEW for tokens in cold)
    assert hits == cold
    assert together == cold
    lines = engine.metrics.text().decode().splitlines()
    [hits_line] = [n for n in lines if "prefix_cache_hits_total" in n and n[0] != "#"]
    assert float(hits_line.split()[-1]) > 0
    with engine._lock:
        engine.scheduler.check()


def test_closing_a_stream_frees_its_slot(engine):
    for _ in range(2 * engine.config.num_slots):
        stream = engine.stream([5, 6, 7], SamplingParams(500, seed=1), frozenset())
        next(stream)
        stream.close()
    assert len(run(engine, [5, 6, 7], 0)) == NEW
    with engine._lock:
        engine.scheduler.check()


def test_a_stop_id_ends_the_stream(engine):
    tokens = run(engine, [9, 8, 7], 0)
    stop = tokens[4]
    stopped = engine.stream([9, 8, 7], settings(0), frozenset({stop}))
    assert [token.id for token in stopped] == tokens[: tokens.index(stop) + 1]


def test_prompts_that_cannot_run_are_refused(engine):
    with pytest.raises(ValueError, match="leaves no room"):
        engine.stream([1] * MAX_LEN, settings(0), frozenset())
    with pytest.raises(ValueError, match="at least one token"):
        engine.stream([], settings(0), frozenset())


def test_sizes_that_cannot_hold_a_context_are_refused():
    cfg = presets.tiny()
    with pytest.raises(ValueError, match="largest context that fits is 256"):
        plan_sizes(cfg, 1024, 2, cache_tokens=300)
    with pytest.raises(ValueError, match="slots=0"):
        plan_sizes(cfg, 1024, 0)


def test_memory_plan_names_every_use():
    cfg = presets.v4_flash()
    _, sizes = plan_sizes(cfg, 1 << 20, 8, 1 << 20)
    line = memory_plan(cfg, Numerics(), sizes)
    assert "cache of 1,048,576 tokens 3.68 GB" in line
    assert "8 slots" in line and "checkpoints" in line


def test_pages_are_as_large_as_kernels_need():
    assert page_for(Numerics(implementation="reference")) == 128
    assert page_for(Numerics("plain", "float32", "pallas")) == 128
    assert page_for(Numerics(implementation="pallas")) == 512
    _, sizes = plan_sizes(presets.v4_flash(), 1 << 20, 8, page_tokens=512)
    assert (sizes.page_tokens, sizes.table_pages, sizes.pages) == (512, 2048, 4097)


def test_a_stopped_engine_refuses_work():
    cfg = presets.tiny().replace(max_len=256)
    params = init_params(cfg, jax.random.key(0))
    engine = Engine(cfg, Numerics(), params, *plan_sizes(cfg, 256, 1))
    engine.start()
    engine.stop()
    with pytest.raises(EngineError, match="stopped"):
        engine.stream([1], settings(0), frozenset())


def test_the_cache_can_be_emptied_while_others_run(engine):
    batch = prompts(3)
    for idle in (batch[8], batch[7]):
        first = engine.stream(idle, SamplingParams(2, temperature=0.0), frozenset())
        assert len(list(first)) == 2
    running = engine.stream(batch[9], SamplingParams(300, seed=1), frozenset())
    next(running)
    assert running.cached_tokens >= 256
    assert engine.flush_cache() >= 512  # but for what the running one stands on
    again = engine.stream(batch[8], SamplingParams(2, temperature=0.0), frozenset())
    assert len(list(again)) == 2
    assert len(list(running)) == 299
    with settled(engine):
        engine.scheduler.check()
    engine.flush_cache()
    with settled(engine):
        assert not engine.scheduler.cache.nodes and not engine.host.used
        assert engine.pages.num_free == engine.pages.num_usable
    cold = engine.stream(batch[8], SamplingParams(2, temperature=0.0), frozenset())
    assert len(list(cold)) == 2 and cold.cached_tokens == 0
