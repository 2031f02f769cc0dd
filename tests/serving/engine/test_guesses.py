"""Guesses in the engine: the same tokens as without them, and only while they pay."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest

from dsv4_jax import presets
from dsv4_jax.model import init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.loop import Engine
from dsv4_jax.serving.engine.pace import PROBE_EVERY, PROBE_STEPS, Pace
from dsv4_jax.serving.engine.request import Request
from dsv4_jax.serving.engine.sizing import plan_sizes
from tests.serving.engine import harness
from tests.serving.engine.conftest import little_room, metric, settled
from tests.serving.engine.device import solo

# When it pays.


def steps(pace: Pace, count: int, rows: int = 1, costs: tuple[float, float] = (1.0, 1.2)):
    """Widths of so many steps that cost so much without guesses and with."""
    widths = []
    for _ in range(count):
        widths.append(pace.width(rows))
        pace.took(rows, widths[-1], costs[widths[-1] > 1])
    return widths


def test_guesses_that_stand_stay_on_but_for_a_look():
    pace = Pace(1)
    for _ in range(100):
        pace.saw(1, 1)
    widths = steps(pace, 3 * PROBE_EVERY)
    assert widths.count(1) == 3 * PROBE_STEPS


def test_guesses_that_fail_are_turned_off_and_on_again():
    pace = Pace(2)
    for _ in range(200):
        pace.saw(2, 0)
    assert steps(pace, 3 * PROBE_EVERY)[-1] == 1
    for _ in range(200):
        pace.saw(2, 2)
    assert steps(pace, 2 * PROBE_EVERY)[-1] == 3


def test_what_pays_for_one_row_need_not_for_many():
    pace = Pace(1)
    for _ in range(200):
        pace.saw(1, 1)
    few = steps(pace, PROBE_EVERY, rows=1, costs=(1.0, 1.3))
    many = steps(pace, PROBE_EVERY, rows=32, costs=(1.0, 2.4))
    assert (few[-1], many[-1]) == (2, 1)


def test_a_single_pause_turns_nothing_off():
    pace = Pace(1)
    for _ in range(100):
        pace.saw(1, 1)
    steps(pace, PROBE_EVERY)
    pace.took(1, 2, 1000.0)
    assert pace.width(1) == 2


def test_pace_obeys():
    assert Pace(0).width(5) == 1
    always = Pace(1, adapts=False)
    for _ in range(300):
        always.saw(1, 0)
    assert set(steps(always, 300, costs=(1.0, 9.0))) == {2}


# On the device of hashes, which takes any number of guesses.


def test_fewer_steps_and_the_same_tokens():
    counts = []
    for changes in ({}, {"guesses": 3}, {"burst": 4}):
        engine = harness.Engine(harness.small_config(**changes))
        requests = [Request(f"r{n}", harness.prompt(150 + n, n), 200) for n in range(4)]
        engine.submit(*requests)
        engine.run()
        engine.check_idle()
        assert all(r.tokens[len(r.prompt) :] == solo(r) for r in requests)
        counts.append(len(engine.plans))
    assert counts[1] < 0.6 * counts[0] and counts[2] < 0.4 * counts[0]


def test_bursts_hold_up_nobody():
    engine = harness.Engine(harness.small_config(burst=4))
    engine.submit(Request("a", harness.prompt(10), 60))
    for _ in range(4):
        engine.step()
    engine.submit(Request("b", harness.prompt(600, 1), 9), Request("g", [5], 30, guided=True))
    engine.run()
    engine.check_idle()
    for plan in engine.plans:
        alone = {row.request.id for row in plan.decode} == {"a"} and not plan.prefill
        assert plan.burst == (alone and plan.width == 4)
    assert {plan.burst for plan in engine.plans} == {False, True}


def test_what_must_be_drawn_one_by_one_is():
    engine = harness.Engine(harness.small_config(guesses=3))
    guided = Request("g", harness.prompt(10), 30, guided=True)
    early = Request("e", harness.prompt(10, 1), 30, early=5)
    engine.submit(guided, early)
    engine.run()
    rows = [row for plan in engine.plans for row in plan.decode]
    assert {row.width for row in rows if row.request is guided} == {1}
    widths = [row.width for row in rows if row.request is early]
    assert set(widths[:4]) == {1} and 4 in widths[4:]  # the prompt drew the first


# On the real one, beside an engine without guesses. Logits are nearly flat, so that some stand.

MAX_LEN, SLOTS = 512, 3


def make_engine(guesses: int, rejects: bool = False, burst: int = 1) -> Engine:
    cfg = presets.tiny().replace(
        max_len=MAX_LEN,
        dense_format=None,
        expert_format=None,
        num_layers=3,
        compress_ratios=(0, 4, 128, 0),
    )
    params = init_params(cfg, jax.random.key(0))
    params["top"]["head"] = params["top"]["head"] / 4
    params = jax.device_put(params, jax.devices()[0])
    scheduling, sizes = plan_sizes(cfg, MAX_LEN, SLOTS, 4 * MAX_LEN, 128, guesses, rejects, burst)
    scheduling = replace(scheduling, reserve_tokens=1)  # so that pages can run out
    num = Numerics("plain", "float32")
    engine = Engine(cfg, num, params, scheduling, sizes, "test", adapts=False)
    engine.warm_up()
    engine.start()
    return engine


def ask(engine: Engine, index: int) -> list[int]:
    """One of 200 requests, half of them greedy; every other shares a beginning."""
    rng = np.random.default_rng(index)
    shared = np.random.default_rng(999).integers(3, 300, 200).tolist()
    prompt = (shared if index % 2 else []) + rng.integers(3, 300, 1 + index % 130).tolist()
    params = SamplingParams(
        int(rng.integers(2, 50)),
        temperature=float(index // 2 % 2),
        seed=index,
        top_p=0.9 if index % 5 == 0 else 1.0,
        frequency_penalty=0.5 if index % 7 == 0 else 0.0,
        logprobs=2 if index % 6 == 0 else None,
    )
    keep = index % 8 == 3
    stream = engine.stream(
        prompt, params, frozenset({17}), tenant="ab"[index % 3 == 0], keep_output=keep
    )
    return [token.id for token in stream]


@pytest.mark.slow
def test_200_prompts_have_the_same_tokens_with_guesses_and_without():
    alone = make_engine(0)
    wanted = [ask(alone, index) for index in range(200)]
    alone.stop()
    engine = make_engine(2)
    for _ in range(4):  # who meets whom, and so whether anyone has to give way, is not decided here
        with little_room(engine, 7), ThreadPoolExecutor(64) as pool:
            got = list(pool.map(lambda index: ask(engine, index), range(200)))
        assert got == wanted
        if metric(engine, "num_preemptions_total") > 0:
            break
    with settled(engine):
        engine.scheduler.check()
    engine.stop()
    assert metric(engine, "num_preemptions_total") > 0
    assert metric(engine, "prefix_cache_hits_total") > 0
    accepted = metric(engine, "spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < metric(engine, "spec_decode_num_draft_tokens_total")
    by_place = metric(engine, "spec_decode_num_accepted_tokens_per_pos_total")
    assert by_place == accepted
    assert metric(engine, "compilations_after_ready_total") == 0


@pytest.mark.slow
def test_prompts_have_the_same_tokens_in_bursts_and_without():
    alone = make_engine(0)
    wanted = [ask(alone, index) for index in range(60)]
    alone.stop()
    engine = make_engine(0, burst=3)
    with little_room(engine, 7), ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda index: ask(engine, index), range(60))) == wanted
    assert [ask(engine, index) for index in range(60)] == wanted
    with settled(engine):
        engine.scheduler.check()
    engine.stop()
    assert metric(engine, "spec_decode_num_draft_tokens_total") == 0
    assert metric(engine, "compilations_after_ready_total") == 0


@pytest.mark.slow
def test_rejection_serves_too():
    engine = make_engine(1, rejects=True)
    first = [ask(engine, index) for index in range(12)]
    assert [ask(engine, index) for index in range(12)] == first
    engine.stop()
    assert metric(engine, "compilations_after_ready_total") == 0


def test_a_model_without_an_mtp_block_is_refused():
    cfg = presets.tiny().replace(
        num_mtp_layers=0, compress_ratios=presets.tiny().compress_ratios[:4]
    )
    with pytest.raises(ValueError, match="guesses=1 need an MTP block"):
        plan_sizes(cfg, MAX_LEN, SLOTS, guesses=1)
    with pytest.raises(ValueError, match="guesses=8 must lie between 0 and 7"):
        plan_sizes(presets.tiny(), MAX_LEN, SLOTS, guesses=8)
    with pytest.raises(ValueError, match="burst=2 must be at least 1, and 1 beside guesses=1"):
        plan_sizes(presets.tiny(), MAX_LEN, SLOTS, guesses=1, burst=2)
