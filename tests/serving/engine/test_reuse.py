"""However a prompt comes to its state, the same bits follow."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dsv4_jax.sampling import SamplingParams
from tests.serving.engine.conftest import forget_prefixes, metric, settled

LENGTHS = (1, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 512, 513, 640, 700)


def make_prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


def ask(engine, prompt, tenant=""):
    params = SamplingParams(6, seed=len(prompt), logprobs=5)
    stream = engine.stream(prompt, params, frozenset(), tenant=tenant)
    return list(stream), stream.cached_tokens


def test_cold_hit_checkpoint_and_host_tier_are_equal(engine):
    forget_prefixes(engine)
    whole = make_prompt(0, LENGTHS[-1])
    cold = {}
    for length in LENGTHS:
        cold[length], cached = ask(engine, whole[:length], tenant=f"alone {length}")
        assert cached == 0
    for length in LENGTHS:  # each goes on from a checkpoint of the ones before it
        tokens, cached = ask(engine, whole[:length], tenant="grows")
        assert tokens == cold[length]
        previous = max((n for n in LENGTHS if n < length), default=0)
        assert cached <= previous and cached % 128 == 0
    for length in LENGTHS:
        tokens, cached = ask(engine, whole[:length], tenant="grows")
        assert tokens == cold[length] and cached == (length - 1) // 128 * 128
    forget_prefixes(engine, host_too=False)
    assert metric(engine, "host_cache_usage_perc") > 0
    for length in reversed(LENGTHS):
        tokens, cached = ask(engine, whole[:length], tenant="grows")
        assert tokens == cold[length] and cached == (length - 1) // 128 * 128


def test_the_same_among_others_that_come_and_go(engine):
    forget_prefixes(engine)
    whole = make_prompt(1, 700)
    jobs = [whole[:n] for n in (129, 257, 385, 513, 700)]
    noise = [make_prompt(100 + i, 50 + 61 * i) for i in range(8)]
    cold = [ask(engine, prompt, tenant="alone")[0] for prompt in jobs]
    for _ in range(3):
        with ThreadPoolExecutor(6) as pool:
            others = [pool.submit(ask, engine, prompt, "noise") for prompt in noise]
            found = list(pool.map(lambda prompt: ask(engine, prompt, "x")[0], jobs))
            assert all(len(other.result()[0]) == 6 for other in others)
        assert found == cold
        forget_prefixes(engine, host_too=False)


def test_the_host_tier_keeps_to_its_size(engine):
    forget_prefixes(engine)
    before = metric(engine, "prefix_cache_evictions_total")
    capacity = engine.host.capacity
    with settled(engine):
        engine.host.capacity = capacity // 400
    try:
        for seed in range(4):
            ask(engine, make_prompt(seed, 500))
            forget_prefixes(engine, host_too=False)
            assert engine.host.used <= engine.host.capacity
        assert metric(engine, "prefix_cache_evictions_total") > before + 16
        assert ask(engine, make_prompt(0, 500))[1] == 0
    finally:
        engine.host.capacity = capacity


def test_the_second_turn_of_a_long_chat_computes_little(engine):
    forget_prefixes(engine)
    first = make_prompt(5, 900)
    answer, cached = ask(engine, first)
    assert cached == 0
    steps = []
    run = engine.runner.run
    engine.runner.run = lambda plan: steps.append(plan) or run(plan)
    try:
        _, cached = ask(engine, [*first, *(token.id for token in answer), *range(3, 40)])
    finally:
        engine.runner.run = run
    assert cached == 896
    assert sum(len(row.tokens) for plan in steps for row in plan.prefill) == 900 + 6 + 37 - 896


@pytest.mark.parametrize("tenant", ["a", "b"])
def test_tenants_do_not_share(engine, tenant):
    prompt = make_prompt(77, 300)
    assert ask(engine, prompt, tenant)[1] == 0
    assert ask(engine, prompt, tenant)[1] == 256
