"""Admission, order, limits and ends, on the checking device."""

import subprocess
import sys

import pytest

from dsv4_jax.serving.engine.prefill import MAX_SKIPS
from dsv4_jax.serving.engine.request import FinishReason, Request, Status
from dsv4_jax.serving.engine.scheduler import Rejection
from dsv4_jax.serving.engine.waiting import QueueLimits
from tests.serving.engine.device import solo
from tests.serving.engine.harness import Engine, prompt, small_config


def make(name, length=100, seed=0, max_tokens=5, **more) -> Request:
    return Request(id=str(name), prompt=prompt(length, seed), max_tokens=max_tokens, **more)


def test_the_engine_half_needs_no_arrays():
    code = "import sys, dsv4_jax.serving.engine.scheduler\nprint({'jax', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_one_request_from_start_to_end():
    engine = Engine()
    request = make("r", length=300, max_tokens=4)
    engine.submit(request)
    assert request.status is Status.WAITING
    first = engine.launch()
    assert first is not None and [len(row.tokens) for row in first.prefill] == [256]
    assert [(s.slot, s.position, s.checkpoint) for s in first.starts] == [(0, 0, None)]
    assert [snapshot.position for snapshot in first.snapshots] == [256]
    assert first.context == 256 and first.sampling_slots == ()
    second = engine.launch()
    assert second is not None and (second.chunk, second.prefill_batch) == (128, 1)
    assert second.sampling_slots == (0,) and request.status is Status.RUNNING
    assert engine.land() == []
    third = engine.launch()
    assert third is not None and [row.stop for row in third.decode] == [301]
    assert [delivery.index for delivery in engine.land()] == [0]
    engine.run()
    assert request.finish_reason is FinishReason.LENGTH and request.num_generated == 4
    engine.check_idle()


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 3])
def test_no_step_is_wasted_on_a_known_end(max_tokens):
    engine = Engine()
    engine.submit(make("r", max_tokens=max_tokens))
    engine.run()
    assert sum(len(plan.decode) for plan in engine.plans) == max(max_tokens - 1, 0)
    assert engine.finished[0].num_generated == max_tokens


def test_what_was_computed_beyond_a_stop_is_discarded():
    engine = Engine()
    request = make("r", max_tokens=50)
    request.limit = 200
    stop = solo(request)[6]
    request.stop_ids = frozenset({stop})
    engine.submit(request)
    engine.run()
    assert request.finish_reason is FinishReason.STOP and request.tokens[-1] == stop
    assert sum(len(plan.decode) for plan in engine.plans) == request.num_generated
    engine.check_idle()


def test_the_context_length_is_a_limit():
    engine = Engine(small_config(max_len=256))
    engine.submit(make("r", length=250, max_tokens=100))
    engine.run()
    assert len(engine.finished[0].tokens) == 256


@pytest.mark.parametrize(("length", "max_tokens"), [(256, 1), (257, 0), (10_000, 5)])
def test_what_can_never_run_is_an_error(length, max_tokens):
    engine = Engine(small_config(max_len=256))
    with pytest.raises(ValueError, match="together may have 256"):
        engine.scheduler.submit(make("r", length=length, max_tokens=max_tokens))
    engine = Engine(num_pages=3)
    with pytest.raises(ValueError, match="together may have 256"):
        engine.scheduler.submit(make("r", length=length, max_tokens=max_tokens))


def test_a_request_does_not_show_its_tokens():
    assert repr(make("r")) == "Request('r', WAITING, tokens=100+0, slot=None)"


def test_bad_requests_are_errors():
    with pytest.raises(ValueError, match="at least one token"):
        Request(id="r", prompt=[], max_tokens=1)
    with pytest.raises(ValueError, match="max_tokens=-1"):
        Request(id="r", prompt=[1], max_tokens=-1)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_slots": 0},
        {"decode_batches": (1, 2)},
        {"decode_batches": (4, 2)},
        {"chunk_sizes": (128, 200)},
        {"chunk_sizes": ()},
        {"checkpoint_every": 100},
        {"ageing_s": 0},
    ],
)
def test_bad_settings_are_errors(changes):
    with pytest.raises(ValueError):
        small_config(**changes)


def test_a_full_queue_says_so_at_once():
    engine = Engine(small_config(queue=QueueLimits(requests=3, tenant_requests=2)))
    for number, tenant in enumerate("aab"):
        engine.submit(make(number, tenant=tenant))
    assert engine.scheduler.submit(make(4, tenant="c")) == Rejection("queue_full", 1)
    engine.run()
    engine.submit(make(5, tenant="c"))
    engine.run()
    assert len(engine.finished) == 4


def test_an_answer_that_has_begun_is_not_refused():
    engine = Engine(small_config(queue=QueueLimits(requests=1, tenant_requests=1)))
    engine.submit(make(0))
    assert engine.scheduler.submit(make(1)) is not None
    engine.submit(make(2, continues=True))
    engine.scheduler.drain()
    engine.submit(make(3, continues=True))
    engine.run()
    assert len(engine.finished) == 3


def test_draining_ends_what_was_taken_and_refuses_the_rest():
    engine = Engine()
    engine.submit(*(make(number) for number in range(9)))
    engine.step()
    engine.scheduler.drain()
    rejection = engine.scheduler.submit(make("late"))
    assert rejection is not None and rejection.reason == "draining"
    engine.run()
    assert {r.finish_reason for r in engine.finished} == {FinishReason.LENGTH}
    assert len(engine.finished) == 9
    engine.check_idle()


def test_everything_can_be_ended_at_once():
    engine = Engine()
    engine.submit(*(make(number, length=300) for number in range(9)))
    for _ in range(4):
        engine.step()
    engine.scheduler.abort_all(FinishReason.SHUTDOWN)
    engine.run()
    assert {r.finish_reason for r in engine.finished} == {FinishReason.SHUTDOWN}
    engine.check_idle()


def test_waiting_too_long_ends_a_request():
    config = small_config(num_slots=1, queue=QueueLimits(timeout_s=5))
    engine = Engine(config)
    engine.submit(make("runs", max_tokens=300), make("waits"))
    engine.step()
    engine.clock.now += 6
    engine.run()
    reasons = {r.id: r.finish_reason for r in engine.finished}
    assert reasons == {"runs": FinishReason.LENGTH, "waits": FinishReason.QUEUE_TIMEOUT}
    engine.check_idle()


def test_wrong_numbers_end_their_request_only_and_are_not_cached():
    engine = Engine()
    engine.submit(make("bad", length=700, seed=1), make("good", length=700, seed=2))
    engine.launch()
    [bad] = [r for r in engine.scheduler.slots.live.values() if r.id == "bad"]
    assert bad.slot is not None
    engine.device.poison.add(bad.slot)
    engine.run()
    assert {r.id: r.finish_reason for r in engine.finished} == {
        "bad": FinishReason.ERROR,
        "good": FinishReason.LENGTH,
    }
    for cached in (0, 640):
        engine.submit(make("again", length=700, seed=1))
        engine.run()
        assert engine.finished[-1].finish_reason is FinishReason.LENGTH
        assert engine.finished[-1].cached_tokens == cached
    engine.check_idle()


def reach(state: str, in_flight: int) -> tuple[Engine, Request]:
    """An engine in which one request is in the given state, with so many steps under way."""
    engine = Engine(small_config(num_slots=2), num_pages=12)
    old = make("old", length=10, seed=2, max_tokens=1000)
    request = make("r", length=900, max_tokens=1000)
    engine.submit(old)
    if state == "waiting":
        engine.submit(make("older", seed=3, max_tokens=1000))
    engine.submit(request)
    for _ in range(3000):
        if state == "prefill" and request.committed == 256 or request.status.name == state.upper():
            while engine.scheduler.num_in_flight < in_flight:
                engine.launch()
            return engine, request
        engine.step()
    raise AssertionError(f"{state} is never reached")


@pytest.mark.parametrize("in_flight", [0, 1, 2])
@pytest.mark.parametrize("state", ["waiting", "prefill", "running", "preempted"])
def test_a_request_can_be_cancelled_in_every_state(state, in_flight):
    engine, request = reach(state, in_flight)
    while engine.scheduler.num_in_flight > in_flight:
        engine.land()
    request.cancel()
    request.cancel()
    if engine.scheduler.num_in_flight == 2:
        engine.land()
    engine.launch()
    assert request.status is Status.FINISHED, "the next step does without it"
    assert request.slot is None and not request.pages and request.pin is None
    engine.check()
    generated = request.num_generated
    engine.run()
    assert request.num_generated == generated
    assert request.finish_reason is FinishReason.CANCELLED
    engine.scheduler.finish(request, FinishReason.ERROR)
    assert request.finish_reason is FinishReason.CANCELLED, "the first end counts"
    engine.check_idle()


def test_a_conversation_is_resumed_where_it_ended():
    engine = Engine()
    first = make("1", length=300, max_tokens=300, keep_output=True)
    engine.submit(first)
    engine.run()
    second = Request(id="2", prompt=[*first.tokens, *prompt(50, 9)], max_tokens=5)
    engine.submit(second)
    engine.run()
    assert second.cached_tokens == 512
    kept = [n.depth * 128 for n in engine.cache.nodes.values() if n.checkpoint is not None]
    assert kept == [256, 512, 640], "ends of prompts and of the output, none inside it"
    engine.check_idle()


def test_the_last_token_of_a_prompt_is_always_computed():
    engine = Engine()
    requests = [make(n, length=256, max_tokens=2, checkpoints=(128, 256)) for n in range(2)]
    for request in requests:
        engine.submit(request)
        engine.run()
    assert [request.cached_tokens for request in requests] == [0, 128]
    longer = make("longer", length=257)
    engine.submit(longer)
    engine.run()
    assert longer.cached_tokens == 256


def test_a_split_gets_a_checkpoint_when_it_is_seen_again():
    engine = Engine()
    shared = prompt(400)
    requests = [
        Request(id=str(n), prompt=shared + prompt(300, n + 1), max_tokens=1) for n in range(3)
    ]
    for request in requests:
        engine.submit(request)
        engine.run()
    assert [request.cached_tokens for request in requests] == [0, 0, 384]


def test_followers_wait_for_the_prefix_of_their_leader():
    engine = Engine()
    leader = make("leader", length=400)
    followers = [make(n, length=400, leader=leader) for n in range(3)]
    engine.submit(leader, *followers)
    engine.run()
    assert [follower.cached_tokens for follower in followers] == [384] * 3
    assert engine.device.computed < 400 + 3 * 16 + 4 * 5
    engine.submit(follower := make("late", leader=leader))
    engine.run()
    assert follower.finish_reason is FinishReason.LENGTH


def test_short_prompts_share_a_chunk_and_decoding_goes_on():
    engine = Engine()
    engine.submit(make("runs", max_tokens=40), make("b", length=90, seed=1))
    engine.launch()
    assert [len(row.tokens) for row in engine.plans[0].prefill] == [90, 100]
    engine.submit(make("c", length=2000, seed=2))
    engine.run()
    mixed = [plan for plan in engine.plans if plan.prefill and plan.decode]
    assert len(mixed) >= 7 and all(plan.num_tokens <= 512 for plan in mixed)


def test_a_long_prompt_is_not_starved_by_short_ones():
    engine = Engine(small_config(prefill_batches=(1,), step_tokens=256))
    long = make("long", length=2000, max_tokens=1)
    engine.submit(long)
    for number in range(200):
        if long.status is Status.FINISHED:
            break
        while len(engine.scheduler.queue) < 4:
            engine.submit(make(f"{number} {len(engine.scheduler.queue)}", seed=5, max_tokens=1))
        engine.step()
    assert long.status is Status.FINISHED
    chunks = [any(row.request is long for row in plan.prefill) for plan in engine.plans]
    waits = "".join("x" if chunk else "." for chunk in chunks).split("x")
    assert max(map(len, waits[:-1])) <= MAX_SKIPS + engine.config.num_slots


def test_a_million_tokens_leave_others_their_turn_and_can_be_cancelled():
    sizes = {"chunk_sizes": (128, 2048), "prefill_batches": (1,), "step_tokens": 2048}
    engine = Engine(small_config(max_len=2**20, checkpoint_every=2**16, **sizes), num_pages=8400)
    long = make("long", length=2**20 - 1, max_tokens=1)
    engine.submit(long)
    for number in range(120):
        if len(engine.scheduler.queue) < 2:
            engine.submit(make(number, length=300, seed=5, max_tokens=8))
        engine.step()
        running = [r for r in engine.scheduler.slots.live.values() if r.status is Status.RUNNING]
        assert engine.plans[-1].decode or not running or number < 2
    assert all(plan.num_tokens <= 2048 for plan in engine.plans if plan.decode)
    assert len(engine.finished) > 30 and 5_000 < long.planned < len(long.prompt)
    long.cancel()
    engine.run()
    assert long.finish_reason is FinishReason.CANCELLED
    engine.check_idle()


def test_only_so_many_long_prompts_are_prefilled_at_once():
    config = small_config(long_prefill=500, prefill_batches=(1,))
    engine = Engine(config)
    engine.submit(*(make(f"long {n}", length=1000, seed=n) for n in range(4)))
    engine.submit(make("short", seed=9))
    for _ in range(200):
        engine.step()
        live = engine.scheduler.slots.live.values()
        assert sum(r.status is Status.PREFILL and r.target > 500 for r in live) <= 2
    assert len(engine.finished) == 5 and engine.finished[0].id == "short"


@pytest.mark.parametrize("tenant", ["", "b"])
def test_who_has_the_turn_and_no_room_is_not_passed_over(tenant):
    engine = Engine(num_pages=9)
    engine.submit(*(make(f"{n}", length=200, seed=n, max_tokens=60) for n in range(4)))
    engine.step()
    large = make("large", length=900, seed=7)
    engine.submit(large)
    number = blocked = 0
    while large.status is Status.WAITING:
        number += 1
        if len(engine.scheduler.queue) < 5:
            engine.submit(make(f"late {number}", length=200, seed=number, tenant=tenant))
        was_next = engine.scheduler._next is large
        planned = len(engine.plans)
        engine.step()
        starts = [start.request for plan in engine.plans[planned:] for start in plan.starts]
        if was_next:
            assert [r for r in starts if r.preemptions == 0][:1] in ([], [large])
        blocked += was_next
    assert blocked > 5 and number < 500
    engine.run()
    engine.check_idle()


def test_a_request_that_needs_every_page_starts_although_a_copy_would_need_one_more():
    engine = Engine(small_config(max_len=1024), num_pages=3, page_tokens=512)
    engine.submit(make("first", length=300, max_tokens=1))
    engine.run()
    second = make("second", length=600, max_tokens=500)
    engine.submit(second)
    engine.run()
    assert second.finish_reason is FinishReason.LENGTH and second.cached_tokens == 0
    engine.check_idle()


def test_room_that_a_restore_under_way_keeps_is_found_later():
    engine = Engine(small_config(max_len=512), num_pages=5)
    engine.submit(make("first", length=400, max_tokens=1))
    engine.run()
    second = make("second", length=400, max_tokens=50)
    engine.submit(second)
    engine.launch()
    assert second.cached_tokens == 384
    second.cancel()
    engine.submit(make("third", length=400, seed=3, max_tokens=50))
    assert engine.launch() is None, "the checkpoint and its pages are still being read"
    engine.run()
    assert engine.finished[-1].finish_reason is FinishReason.LENGTH
    engine.check_idle()


def test_low_priority_waits_but_not_for_ever():
    engine = Engine(small_config(num_slots=1, ageing_s=1.0))
    low = make("low", priority=-3)
    engine.submit(make("first"))
    engine.step()
    engine.submit(low)
    for number in range(2000):
        if low.status is Status.FINISHED:
            break
        if len(engine.scheduler.queue) < 3:
            engine.submit(make(number, priority=0))
        engine.step()
    assert low.times.started is not None
    assert 3.0 < low.times.started - low.times.arrived < 3.0 + 0.5


def test_tenants_share_the_engine():
    engine = Engine(small_config(quantum=128, queue=QueueLimits(requests=1000)))
    for number in range(120):
        engine.submit(make(f"many {number}", tenant="many", seed=number, max_tokens=10))
    for number in range(12):
        engine.submit(make(f"few {number}", tenant="few", seed=number, max_tokens=10))
    engine.run()
    last = max(i for i, r in enumerate(engine.finished) if r.tenant == "few")
    assert last < 12 * 2 + 4 * 2, "the small tenant does not wait for the large one"


def test_a_guided_request_never_runs_ahead_and_keeps_nobody_else_from_it():
    engine = Engine()
    guided, free = make("g", guided=True, max_tokens=20), make("f", seed=1, max_tokens=40)
    engine.submit(guided, free)
    while engine.scheduler.has_work:
        engine.step()
        assert guided.in_flight <= 1
    rows = [[row.request for row in plan.decode] for plan in engine.plans]
    assert all(rows[i].count(guided) + rows[i + 1].count(guided) < 2 for i in range(len(rows) - 1))
    assert sum(free in decode and guided not in decode for decode in rows) >= 19
    assert guided.num_generated == 20 and free.num_generated == 40
    engine.check_idle()


@pytest.mark.parametrize("state", ["waiting", "first chunk", "prefill", "running", "preempted"])
def test_cancelling_frees_everything_with_the_next_plan(state):
    engine = Engine(small_config(reserve_tokens=1), num_pages=9)
    request = make("r", length=600, seed=1, max_tokens=300)
    others = [make(n, length=250, seed=n, max_tokens=300, priority=1) for n in range(2, 4)]
    if state == "waiting":
        engine.submit(request)
    elif state == "preempted":
        engine.submit(request)
        engine.step()
        engine.submit(*others)
        while request.status is not Status.PREEMPTED:
            engine.step()
        assert engine.device.parked
    else:
        engine.submit(request)
        steps = {"first chunk": 1, "prefill": 2, "running": 8}[state]
        for _ in range(steps):
            engine.step()
        assert request.is_live
    request.cancel()
    engine.launch() if engine.scheduler.num_in_flight < 2 else engine.land()
    engine.step()
    assert request.status is Status.FINISHED and not request.is_live and not request.pages
    assert not engine.device.parked
    engine.run()
    assert request.finish_reason is FinishReason.CANCELLED
    engine.check_idle()
