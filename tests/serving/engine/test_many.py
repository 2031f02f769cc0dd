"""Sixty-four streams at a time."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from dsv4_jax import presets
from dsv4_jax.model import init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.loop import Engine
from dsv4_jax.serving.engine.sizing import plan_sizes
from tests.serving.engine.conftest import metric

STREAMS, NEW = 64, 48


@pytest.mark.slow
def test_64_streams_are_their_solo_runs():
    cfg = presets.tiny().replace(max_len=512)
    params = init_params(cfg, jax.random.key(0))
    sizes = plan_sizes(cfg, 512, slots=STREAMS, cache_tokens=512 * STREAMS)
    engine = Engine(cfg, Numerics(), params, *sizes)
    engine.warm_up()
    engine.start()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 300, rng.integers(1, 200)).tolist() for _ in range(STREAMS)]

    def ask(index: int) -> list[int]:
        greedy = index % 4 == 0
        params = SamplingParams(NEW, temperature=0.0 if greedy else 1.0, seed=index, logprobs=1)
        stream = engine.stream(prompts[index], params, frozenset(), tenant=str(index))
        return list(stream)

    try:
        with ThreadPoolExecutor(STREAMS) as pool:
            together = list(pool.map(ask, range(STREAMS)))
        assert [ask(index) for index in range(STREAMS)] == together
        assert all(len(tokens) == NEW for tokens in together)
        assert metric(engine, "compilations_after_ready_total") == 0
        engine.scheduler.check()
    finally:
        engine.stop()
