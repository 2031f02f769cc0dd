"""Short prompts, and the ends of longer ones, share a chunk."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.prefill import tail_start
from dsv4_jax.serving.engine.request import Request
from tests.serving.engine.conftest import forget_prefixes, metric
from tests.serving.engine.harness import Engine, prompt, small_config

SHAPE = (4, 64)


def make_engine(**changes) -> Engine:
    sizes = {"chunk_sizes": (256,), "prefill_batches": (1,), "tail_shape": SHAPE}
    return Engine(small_config(**(sizes | changes)))


@pytest.mark.parametrize(
    ("length", "start"),
    [(1, 0), (64, 0), (65, 65), (127, 127), (128, 128), (129, 128), (192, 128), (193, 193)],
)
def test_where_a_tail_begins(length, start):
    assert tail_start(length, SHAPE) == start
    assert tail_start(length, None) == length


@pytest.mark.parametrize("shape", [(0, 64), (2, 0), (2, 129), (9, 64)])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="tail_shape"):
        small_config(tail_shape=shape)


def test_four_short_prompts_are_one_step():
    engine = make_engine()
    lengths = (1, 20, 63, 64)
    requests = [Request(f"r{n}", prompt(n, n), 3) for n in lengths]
    engine.submit(*requests)
    engine.run()
    first = engine.plans[0]
    assert (first.prefill_batch, first.chunk) == SHAPE
    assert sorted(len(row.tokens) for row in first.prefill) == list(lengths)
    assert all(row.samples for row in first.prefill)
    assert not any(plan.prefill for plan in engine.plans[1:])
    engine.check_idle()


def test_ends_of_long_prompts_join_the_short_ones():
    engine = make_engine()
    engine.submit(Request("long", prompt(300, 1), 2), Request("short", prompt(30, 2), 2))
    engine.submit(Request("odd", prompt(100, 3), 2))  # too long for a shared chunk
    engine.run()
    shapes = [(p.prefill_batch, p.chunk, len(p.prefill)) for p in engine.plans if p.prefill]
    assert shapes == [(4, 64, 1), (1, 256, 1), (1, 256, 1), (4, 64, 1)]
    engine.submit(*(Request(f"again {n}", prompt(300, 1) + prompt(8, n), 2) for n in range(3)))
    before = len(engine.plans)
    engine.run()
    assert all(request.cached_tokens == 256 for request in engine.finished[-3:])
    shapes = [(p.chunk, len(p.prefill)) for p in engine.plans[before:] if p.prefill]
    assert shapes == [(64, 3)], "three ends behind one cached prefix are one step"
    engine.check_idle()


def test_a_long_prompt_is_not_starved_by_short_ones():
    engine = make_engine(num_slots=4)
    long = Request("long", prompt(2000, 1), 1)
    engine.submit(long)
    for number in range(200):
        if len(engine.scheduler.queue) < 2:
            engine.submit(Request(f"s{number}", prompt(40, number), 1))
        engine.step()
        if long in engine.finished:
            break
    assert long in engine.finished


def test_rows_of_a_shared_chunk_do_not_see_each_other(engine):
    """Tokens and log-probabilities, alone and together, cold and behind a cached prefix."""
    assert engine.config.tail_shape is not None
    rng = np.random.default_rng(5)
    base = rng.integers(3, 300, 256).tolist()
    ends = [rng.integers(3, 300, n).tolist() for n in (1, 17, 64, 33, 50, 64)]
    prompts = [ends[0], ends[1], ends[2], *([*base, *end] for end in ends[3:])]

    def ask(index: int) -> list:
        params = SamplingParams(5, seed=index, logprobs=5)
        return list(engine.stream(prompts[index], params, frozenset()))

    forget_prefixes(engine)
    alone = []
    for index in range(len(prompts)):
        forget_prefixes(engine)
        alone.append(ask(index))
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, range(len(prompts)))) == alone
    assert metric(engine, "prefix_cache_hits_total") > 0
