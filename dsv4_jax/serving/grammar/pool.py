"""Making grammars on threads of their own, each request within a time limit."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")
LIMIT_S = 2.0
THREADS = 2


class TooSlow(Exception):
    """Work that was given up: it took too long, or others that did left it no thread."""


class _Work(Generic[T]):
    def __init__(self, work: Callable[[Callable[[], bool]], T]) -> None:
        self.begun_s: float | None = None
        self.is_late = threading.Event()
        self._work = work

    def __call__(self) -> T:
        self.begun_s = time.monotonic()
        return self._work(self.is_late.is_set)


class Pool:
    """Threads for work that may turn out to be too much.

    What is late cannot be stopped from outside: it is left behind, and told so to stop by itself.
    """

    def __init__(self, limit_s: float = LIMIT_S, threads: int = THREADS) -> None:
        self.limit_s = limit_s
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="grammar")

    def run(self, work: Callable[[Callable[[], bool]], T]) -> T:
        """Returns what `work` returns; it gets a function that says whether it is late.

        Raises:
            TooSlow: it took longer than the limit, or waited that long for its turn.
            Exception: what `work` raised.
        """
        own = _Work(work)
        future: Future[T] = self._executor.submit(own)
        wait([future], self.limit_s)
        if not future.cancel():  # it runs, and may have had to wait for its turn
            begun_s = time.monotonic() if own.begun_s is None else own.begun_s
            wait([future], begun_s + self.limit_s - time.monotonic())
        if not future.done() or future.cancelled():
            own.is_late.set()
            raise TooSlow
        return future.result()
