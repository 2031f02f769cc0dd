import random

import pytest

from dsv4_jax.serving.engine.request import Request
from dsv4_jax.serving.engine.waiting import QueueLimits, WaitingQueue

QUANTUM = 100


def request(number, tenant="a", priority=0, tokens=10, ageing_s=30.0) -> Request:
    made = Request(id=str(number), prompt=[0] * tokens, max_tokens=1, tenant=tenant)
    made.order, made.urgency = number, priority * ageing_s - number  # one arrives per second
    return made


def start(queue, picked, cost):
    queue.take_slot(picked.tenant)
    queue.remove(picked)
    queue.charge(picked.tenant, cost)


def next_of(queue):
    return queue.pick(lambda _: True)


def serve(queue, cost):
    """Serves the next request alone and to its end; returns its tenant."""
    picked = next_of(queue)
    start(queue, picked, cost)
    queue.free_slot(picked.tenant)
    queue.check()
    return picked.tenant


def test_the_queue_is_bounded_by_requests_tokens_and_tenant():
    queue = WaitingQueue(QueueLimits(requests=4, tokens=100, tenant_requests=2), QUANTUM)
    assert queue.why_full(request(0, tokens=500)) is None, "one request may always wait"
    queue.add(request(0, tokens=80))
    assert queue.why_full(request(1, "b", tokens=21)) == "queue_full"
    queue.add(request(1, "a", tokens=1))
    assert queue.why_full(request(2, "a", tokens=1)) == "tenant_limit"
    queue.add(request(2, "b", tokens=1))
    queue.add(request(3, "c", tokens=1))
    assert queue.why_full(request(4, "d", tokens=1)) == "queue_full"
    queue.check()


def test_bad_limits_are_refused():
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        QueueLimits(tokens=0)


def test_a_tenant_gets_only_so_many_slots():
    queue = WaitingQueue(QueueLimits(tenant_slots=1), QUANTUM)
    for number, tenant in enumerate("aab"):
        queue.add(request(number, tenant))
    start(queue, next_of(queue), 1)
    picked = next_of(queue)
    assert picked is not None and picked.tenant == "b"
    start(queue, picked, 1)
    assert next_of(queue) is None
    queue.free_slot("a")
    assert next_of(queue) is not None


def test_inside_a_tenant_priority_counts_as_much_as_waiting():
    queue = WaitingQueue(QueueLimits(), QUANTUM)
    waiting = [request(0, priority=-1), request(20, priority=0), request(25, priority=1)]
    waiting += [request(31, priority=-1), request(90, priority=1)]
    for each in waiting:
        queue.add(each)
    order = []
    while (picked := next_of(queue)) is not None:
        start(queue, picked, 1)
        order.append(picked.order)
    assert order == [25, 20, 0, 90, 31]


def test_who_may_not_start_does_not_stop_others():
    queue = WaitingQueue(QueueLimits(), QUANTUM)
    for number, tenant in enumerate("aab"):
        queue.add(request(number, tenant))
    picked = queue.pick(lambda r: r.order == 2)
    assert picked is not None and picked.order == 2
    assert queue.pick(lambda r: False) is None


def test_picking_again_without_serving_changes_nothing():
    queue = WaitingQueue(QueueLimits(), QUANTUM)
    for number in range(20):
        queue.add(request(number, "ab"[number % 2]))
    assert len({next_of(queue) for _ in range(50)}) == 1
    queue.check()


@pytest.mark.parametrize("slots", [1, 4])
def test_tenants_get_equal_service_whatever_they_send(slots):
    """The difference never exceeds a turn and what can run at once."""
    rng = random.Random(slots)
    costs = {"few": 900, "many": 30, "mixed": 400}
    queue = WaitingQueue(QueueLimits(requests=10_000), QUANTUM)
    served = dict.fromkeys(costs, 0)
    running: list[str] = []
    for number in range(6000):
        for tenant, backlog in (("few", 2), ("many", 40), ("mixed", 5)):
            while sum(r.tenant == tenant for r in queue) < backlog:
                queue.add(request(number, tenant, priority=rng.randint(0, 2)))
        if len(running) == slots:
            queue.free_slot(running.pop(rng.randrange(slots)))
        picked = next_of(queue)
        assert picked is not None
        cost = rng.randint(1, costs[picked.tenant])
        start(queue, picked, 0)
        queue.charge(picked.tenant, cost)
        running.append(picked.tenant)
        served[picked.tenant] += cost
        assert max(served.values()) - min(served.values()) <= QUANTUM + 900 * slots
    queue.check()
    assert min(served.values()) > 50_000


def test_using_what_nobody_wanted_is_not_held_against_a_tenant():
    queue = WaitingQueue(QueueLimits(), QUANTUM)
    queue.add(request(0, "alone"))
    start(queue, next_of(queue), 1_000_000)
    for number in range(1, 41):
        queue.add(request(number, "ab"[number % 2].replace("b", "alone")))
    turns = [serve(queue, QUANTUM) for _ in range(20)]
    assert turns.count("a") == turns.count("alone") == 10


def test_leaving_and_coming_back_does_not_clear_a_debt():
    queue = WaitingQueue(QueueLimits(), QUANTUM)
    served = {"steady": 0, "sly": 0}
    cost = {"steady": 500, "sly": 5000}
    for number in range(400):
        for tenant, backlog in (("steady", 10), ("sly", 1)):  # sly has nothing after its turn
            while sum(r.tenant == tenant for r in queue) < backlog:
                queue.add(request(number, tenant))
        tenant = serve(queue, cost[next_of(queue).tenant])
        served[tenant] += cost[tenant]
    assert abs(served["steady"] - served["sly"]) <= QUANTUM + 5000


def test_tenants_that_are_gone_leave_nothing_behind():
    queue = WaitingQueue(QueueLimits(), QUANTUM)
    for number in range(1000):
        queue.add(request(number, f"tenant {number}"))
        serve(queue, 1000)
    assert not queue._tenants


def test_a_tenant_may_fill_free_slots_before_its_limit_counts():
    queue = WaitingQueue(QueueLimits(tenant_requests=1, tenant_slots=2), QUANTUM)
    for number in range(3):
        assert queue.why_full(request(number), free_slots=8) is None
        queue.add(request(number))
    assert queue.why_full(request(3), free_slots=8) == "tenant_limit"
    start(queue, next_of(queue), 1)
    assert queue.why_full(request(3), free_slots=7) == "tenant_limit"
    start(queue, next_of(queue), 1)
    assert queue.why_full(request(3), free_slots=6) == "tenant_limit"
    assert queue.why_full(request(3, "b"), free_slots=0) is None
