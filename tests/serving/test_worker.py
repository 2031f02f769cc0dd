"""The queue before the model: order, bounds, cancelling."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.worker import MAX_READY, Job, ModelThread
from tests.serving.fakes import PATIENCE_S


async def all_of(job: Job[int]) -> list[int]:
    items: list[int] = []
    while (batch := await job.next()) is not None:
        items += batch
    return items


def gated(gate: threading.Event, *items: int) -> Callable[[Callable[[], bool]], Iterator[int]]:
    def work(is_cancelled: Callable[[], bool]) -> Iterator[int]:
        assert gate.wait(PATIENCE_S)
        for item in items:
            if is_cancelled():
                return
            yield item

    return work


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


def test_work_runs_in_order_and_items_arrive_in_order():
    async def check() -> None:
        thread: ModelThread[int] = ModelThread(max_waiting=2)
        jobs = [thread.admit(lambda _, n=n: iter(range(n))) for n in (3, 0, 2)]
        assert [await all_of(job) for job in jobs] == [[0, 1, 2], [], [0, 1]]
        await until(lambda: thread.admitted == 0)
        await thread.close()

    asyncio.run(check())


def test_beyond_the_bound_work_is_refused_at_once():
    async def check() -> None:
        gate = threading.Event()
        thread: ModelThread[int] = ModelThread(max_waiting=1)
        jobs = [thread.admit(gated(gate, 1)) for _ in range(2)]
        with pytest.raises(ApiError) as caught:
            thread.admit(gated(gate))
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert int(caught.value.headers["retry-after"]) > 0
        gate.set()
        assert [await all_of(job) for job in jobs] == [[1], [1]]
        await until(lambda: thread.admitted == 0)
        assert await all_of(thread.admit(gated(gate, 5))) == [5]
        await thread.close()

    asyncio.run(check())


def test_cancelled_while_waiting_never_starts_and_frees_its_place():
    async def check() -> None:
        gate, started = threading.Event(), threading.Event()

        def second(_: Callable[[], bool]) -> Iterator[int]:
            started.set()
            yield 2

        thread: ModelThread[int] = ModelThread(max_waiting=1)
        first = thread.admit(gated(gate, 1))
        waiting = thread.admit(second)
        waiting.cancel()
        with pytest.raises(ApiError) as caught:  # at once, not when its turn comes
            await asyncio.wait_for(waiting.next(), PATIENCE_S)
        assert caught.value.code == "request_cancelled"
        await until(lambda: thread.admitted == 1)
        third = thread.admit(gated(gate, 3))
        gate.set()
        assert await all_of(first) == [1]
        assert await all_of(third) == [3]
        assert not started.is_set()
        await thread.close()

    asyncio.run(check())


def test_cancelled_while_running_stops_at_its_next_look():
    async def check() -> None:
        steps = threading.Semaphore(1)
        ended = threading.Event()

        def endless(is_cancelled: Callable[[], bool]) -> Iterator[int]:
            while not is_cancelled():
                assert steps.acquire(timeout=PATIENCE_S)
                yield 0
            ended.set()

        thread: ModelThread[int] = ModelThread(max_waiting=0)
        job = thread.admit(endless)
        assert await job.next() == [0]
        job.cancel()
        steps.release()
        await until(ended.is_set)
        await until(lambda: thread.admitted == 0)
        await thread.close()

    asyncio.run(check())


def test_errors_arrive_after_the_items_before_them():
    async def check() -> None:
        def breaks(_: Callable[[], bool]) -> Iterator[int]:
            yield 1
            raise KeyError("x")

        thread: ModelThread[int] = ModelThread(max_waiting=0)
        job = thread.admit(breaks)
        assert await job.next() == [1]
        for _ in range(2):
            with pytest.raises(KeyError):
                await job.next()
        await thread.close()

    asyncio.run(check())


def test_closing_stops_work_and_refuses_more():
    async def check() -> None:
        ended = threading.Event()

        def endless(is_cancelled: Callable[[], bool]) -> Iterator[int]:
            while not is_cancelled():
                yield 0
            ended.set()

        thread: ModelThread[int] = ModelThread(max_waiting=1)
        thread.admit(endless)
        waiting = thread.admit(endless)
        await thread.close()
        assert ended.is_set()
        with pytest.raises(ApiError) as never_started:
            await all_of(waiting)
        with pytest.raises(ApiError) as refused:
            thread.admit(endless)
        assert never_started.value.status == refused.value.status == 503

    asyncio.run(check())


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_work_that_nobody_takes_waits(is_cancelled, monkeypatch):
    monkeypatch.setattr("dsv4_jax.serving.worker.LOOK_S", 0.01)
    more = MAX_READY + 10

    async def check() -> None:
        made: list[int] = []

        def work(must_stop: Callable[[], bool]) -> Iterator[int]:
            for item in range(more):
                if must_stop():
                    return
                made.append(item)
                yield item

        thread: ModelThread[int] = ModelThread(max_waiting=0)
        job = thread.admit(work)
        await until(lambda: len(made) > MAX_READY)
        await asyncio.sleep(0.05)
        assert len(made) == MAX_READY + 1
        if is_cancelled:
            job.cancel()
        else:
            assert await all_of(job) == list(range(more))
        await until(lambda: thread.admitted == 0)
        assert len(made) == (MAX_READY + 1 if is_cancelled else more)
        await thread.close()

    asyncio.run(check())
