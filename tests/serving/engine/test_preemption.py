"""When pages run out: who gives way, and that nothing of it shows in the tokens."""

import random

import pytest

from dsv4_jax.serving.engine import scheduler
from dsv4_jax.serving.engine.request import FinishReason, Request, Status
from tests.serving.engine.harness import Engine, prompt, small_config


def make(name, seed, **more) -> Request:
    values = {"prompt": prompt(100, seed), "max_tokens": 400, "tenant": str(seed % 2)}
    return Request(id=str(name), **(values | more))


def tight(**sizes) -> Engine:
    return Engine(small_config(reserve_tokens=1), **({"num_pages": 9} | sizes))


def test_the_newest_of_low_priority_gives_way_and_goes_on_exactly():
    engine = tight()
    requests = [make("old", 1), make("low", 2, priority=-1), make("new", 3), make("newer", 4)]
    for request in requests:
        engine.submit(request)
        engine.clock.now += 1
    order: list[str] = []
    while engine.scheduler.has_work:
        engine.step()
        order += [r.id for r in requests if r.preemptions and r.id not in order]
        engine.check()
    assert order[:2] == ["low", "newer"] and "old" not in order
    assert all(r.finish_reason is FinishReason.LENGTH for r in requests)  # tokens: see harness
    assert all(r.num_generated == engine.delivered[r] == 400 for r in requests)
    engine.check_idle()


def test_a_preempted_request_keeps_the_tokens_that_were_under_way():
    engine = tight(num_pages=4)
    old, new = make("old", 1), make("new", 2, prompt=prompt(120, 2), max_tokens=200)
    engine.submit(old, new)
    while not new.preemptions:
        if engine.scheduler.num_in_flight == 2:
            engine.land()
        engine.launch()
    assert new.in_flight == 1 and new.status is Status.PREEMPTED
    before = new.num_generated
    engine.land()
    assert new.in_flight == 0 and new.num_generated == before + 1
    engine.run()
    assert new.num_generated == 200
    engine.check_idle()


def test_a_preempted_request_goes_before_new_ones():
    engine = tight(num_pages=6)
    first, second = make("first", 1), make("second", 2)
    engine.submit(first, second)
    while not second.preemptions:
        engine.step()
    engine.submit(*(make(n, n, max_tokens=1, tenant="z") for n in range(3)))
    while second.status is not Status.FINISHED:
        assert all(r.status is Status.WAITING for r in engine.scheduler.queue)
        assert second.is_live or len(engine.scheduler.queue) == 3
        engine.step()
    engine.run()
    engine.check_idle()


def test_a_preempted_request_goes_on_where_it_was_and_computes_nothing_twice():
    engine = tight(num_pages=8)
    old, new = make("old", 1), make("new", 2, prompt=prompt(300, 2))
    engine.submit(old, new)
    engine.run()
    assert new.preemptions
    starts = [s for p in engine.plans for s in p.starts if s.request is new]
    assert not starts[0].is_resumed and all(start.is_resumed for start in starts[1:])
    assert engine.device.resumed == new.preemptions
    assert engine.device.computed == len(old.tokens) + len(new.tokens) - 2


def storm(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        make(
            n,
            n,
            prompt=prompt(rng.choice((10, 120, 250)), n % 3),
            max_tokens=rng.choice((130, 300, 500)),
            priority=rng.randint(-1, 1),
            keep_output=rng.random() < 0.5,
        )
        for n in range(24)
    ]
    engine.submit(*requests)
    while engine.scheduler.has_work:
        engine.step()
        engine.check()
    assert sum(r.preemptions for r in requests) > 5
    assert all(r.finish_reason is FinishReason.LENGTH for r in requests)
    engine.check_idle()


@pytest.mark.parametrize(
    "sizes", [{}, {"page_tokens": 256, "num_pages": 6}, {"checkpoints": 0}, {"host": True}]
)
def test_a_storm_of_preemptions_is_survived(sizes):
    storm(tight(**sizes), seed=4)


@pytest.mark.parametrize("steps", [1, 4])
def test_how_far_the_loop_plans_ahead_does_not_matter(steps, monkeypatch):
    monkeypatch.setattr(scheduler, "MAX_IN_FLIGHT", steps)
    storm(tight(look_ahead=steps), seed=5)
