"""Threads that follow one answer each, and the queue before them."""

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from dsv4_jax.serving.errors import cancelled, not_ready, queue_full

T = TypeVar("T")
MAX_READY = 1024  # items of a job that nobody has taken; then its work waits
LOOK_S = 1.0  # how often work that waits looks whether it must stop
# Work gets a function that says whether nobody waits for its items any more.
Work = Callable[[Callable[[], bool]], Iterable[T]]


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Job(Generic[T]):
    """One piece of work: items made on the model thread, taken on the event loop."""

    def __init__(
        self,
        work: "Work[T]",
        stopping: threading.Event,
        on_cancel: Callable[[], None] = lambda: None,
    ) -> None:
        self._work = work
        self._on_cancel = on_cancel
        self._stopping = stopping
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T | _End] = asyncio.Queue()
        self._room = threading.Semaphore(MAX_READY)
        self._future: Future[None] | None = None

    async def next(self) -> list[T] | None:
        """Waits for items and returns all that are ready; None after the last ones.

        Raises:
            Exception: what the work raised, after the items before it.
        """
        batch = [await self._queue.get()]
        while not isinstance(batch[-1], _End) and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        items = [item for item in batch if not isinstance(item, _End)]
        if items:
            self._room.release(len(items))
        if isinstance(end := batch[-1], _End):
            self._queue.put_nowait(end)  # for the next call
            if not items and end.error is not None:
                raise end.error
        return items or None

    def cancel(self) -> None:
        """Makes the work stop at its next look, or never start; does nothing if it has ended."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            if self._future is not None and self._future.cancel():
                self._queue.put_nowait(_End(cancelled()))  # nobody else will tell who waits
            self._on_cancel()

    def submit(self, executor: Executor, then: Callable[[], None]) -> None:
        """Hands the work to `executor`; `then` is called on the loop when it is out of the way."""
        self._future = executor.submit(self._run)
        self._future.add_done_callback(lambda _: _call_on(self._loop, then))

    def _run(self) -> None:
        """Does the work; runs on the model thread."""
        end = _End()
        try:
            if self._must_stop():
                raise cancelled() if self._cancelled.is_set() else not_ready("draining")
            for item in self._work(self._must_stop):
                while not self._room.acquire(timeout=LOOK_S) and not self._must_stop():
                    pass
                self._put(item)
        except BaseException as error:
            end = _End(error)
        self._put(end)

    def _must_stop(self) -> bool:
        return self._cancelled.is_set() or self._stopping.is_set()

    def _put(self, item: T | _End) -> None:
        _call_on(self._loop, lambda: self._queue.put_nowait(item))


class ModelThread(Generic[T]):
    """Runs work in the order of arrival, `workers` pieces at a time; `max_waiting` more may wait.

    The event loop stays free meanwhile. Methods belong to it, but for `drain` and `stop`.
    """

    def __init__(self, max_waiting: int, retry_after_s: int = 5, workers: int = 1) -> None:
        self.max_waiting = max_waiting
        self.workers = workers
        self.retry_after_s = retry_after_s
        self.admitted = 0
        self._stopping = threading.Event()
        self._is_draining = False
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="model")

    def check_room(self) -> None:
        """Does nothing if `admit` would take work now.

        Raises:
            ApiError: 429, the queue is full; 503, the server is shutting down.
        """
        if self._is_draining or self._stopping.is_set():
            raise not_ready("draining")
        if self.admitted >= self.workers + self.max_waiting:
            raise queue_full(self.retry_after_s)

    def admit(self, work: "Work[T]", on_cancel: Callable[[], None] = lambda: None) -> Job[T]:
        """Queues `work`. Cancel the job unless all its items were taken.

        Args:
            on_cancel: called on the loop when the job is cancelled, whether it has started or not.

        Raises:
            ApiError: as `check_room`.
        """
        self.check_room()
        return self.enqueue(work, on_cancel)

    def enqueue(self, work: "Work[T]", on_cancel: Callable[[], None] = lambda: None) -> Job[T]:
        """As `admit`, for work that belongs to a request which was admitted: never refused."""
        self.admitted += 1
        job = Job(work, self._stopping, on_cancel)
        job.submit(self._executor, then=self._release)
        return job

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def drain(self) -> None:
        """Refuses further work; what was admitted goes on."""
        self._is_draining = True

    def stop(self) -> None:
        """Makes the current work stop at its next look and refuses further work."""
        self._stopping.set()

    async def close(self) -> None:
        """Stops and waits until the thread has ended."""
        self.stop()
        await asyncio.to_thread(self._executor.shutdown)

    def _release(self) -> None:
        self.admitted -= 1


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Calls `function` on the loop from another thread; does nothing once the loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
