"""Random events against the checking device: nothing is lost, mixed up or left behind."""

import random

import pytest

from dsv4_jax.serving.engine.request import FinishReason, Request
from dsv4_jax.serving.engine.waiting import QueueLimits
from tests.serving.engine.harness import Engine, prompt, small_config

SHAPES = {
    "one unit per page": {"num_pages": 25, "page_tokens": 128},
    "four units per page": {"num_pages": 9, "page_tokens": 512},
    "few checkpoints": {"num_pages": 25, "page_tokens": 128, "checkpoints": 3},
    "no checkpoints": {"num_pages": 25, "page_tokens": 128, "checkpoints": 0},
    "a second tier": {"num_pages": 17, "page_tokens": 256, "checkpoints": 4, "host": True},
    "little room": {"num_pages": 8, "page_tokens": 256, "checkpoints": 8},
    "shared chunks": {"num_pages": 25, "tail_shape": (3, 100)},
    "guesses": {"num_pages": 25, "guesses": 3},
    "guesses and little room": {"num_pages": 8, "page_tokens": 256, "guesses": 1},
    "guesses and hardly any room": {"num_pages": 10, "checkpoints": 8, "guesses": 6},
    "bursts": {"num_pages": 25, "burst": 4},
    "bursts and little room": {"num_pages": 8, "page_tokens": 256, "burst": 3},
    "hardly any room": {"num_pages": 10, "page_tokens": 128, "checkpoints": 8},
}


def make_request(rng: random.Random, engine: Engine, number: int) -> Request:
    if engine.finished and rng.random() < 0.4:  # the next turn of a conversation
        previous = rng.choice(engine.finished[-8:])
        tokens, tenant = previous.tokens[:700], previous.tenant
        tokens = tokens + prompt(rng.randint(1, 60), number)
    else:
        tenant = rng.choice("abc")
        shared = prompt(rng.choice((0, 100, 128, 256, 300, 512)), rng.randint(0, 2))
        tokens = shared + prompt(rng.randint(1, 200), number)
    leader = rng.choice(list(engine.scheduler.requests()) or [None])
    points = [rng.randint(1, len(tokens)) for _ in range(rng.randint(0, 2))]
    return Request(
        id=f"r{number}",
        prompt=tokens,
        max_tokens=rng.choice((0, 1, 2, 20, 150, 500)),
        tenant=tenant,
        priority=rng.randint(-1, 1),
        stop_ids=frozenset({7}) if rng.random() < 0.3 else frozenset(),
        checkpoints=points,
        keep_output=rng.random() < 0.5,
        guided=rng.random() < 0.2,
        early=rng.choice((0, 0, 3)),
        reuse_prefix=rng.random() < 0.9,
        leader=leader if rng.random() < 0.2 else None,
    )


def run_events(engine: Engine, events: int, seed: int) -> None:
    rng = random.Random(seed)
    submitted = 0
    for number in range(events):
        engine.clock.now += rng.random() * 0.1
        choice = rng.random()
        requests = list(engine.scheduler.requests())
        if choice < 0.05:
            request = make_request(rng, engine, number)
            submitted += engine.scheduler.submit(request) is None
        elif choice < 0.06 and requests:
            rng.choice(requests).cancel()
        elif choice < 0.065 and requests:
            engine.scheduler.finish(rng.choice(requests), FinishReason.CANCELLED)
        elif choice < 0.068 and engine.scheduler.slots.live:
            engine.device.poison.add(rng.choice(list(engine.scheduler.slots.live)))
        elif choice < 0.53 and engine.scheduler.num_in_flight:
            engine.land()
        elif engine.scheduler.num_in_flight < 2:
            engine.launch()
        engine.check()
    engine.run()
    assert len(engine.finished) == submitted
    assert {r.finish_reason for r in engine.finished} > {FinishReason.STOP, FinishReason.LENGTH}
    engine.check_idle()


def make_engine(shape: str) -> Engine:
    limits = QueueLimits(requests=12, tokens=4000, tenant_requests=6, timeout_s=20)
    sizes = dict(SHAPES[shape])
    tail_shape = sizes.pop("tail_shape", None)
    steps = {name: sizes.pop(name) for name in ("guesses", "burst") if name in sizes}
    config = small_config(
        max_len=900, reserve_tokens=16, queue=limits, tail_shape=tail_shape, **steps
    )
    return Engine(config, **sizes)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_events(shape):
    engine = make_engine(shape)
    run_events(engine, 2_000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hundred_thousand_random_events(shape, seed):
    """10⁴ for every shape and seed."""
    run_events(make_engine(shape), 10_000, seed=seed + 10)
