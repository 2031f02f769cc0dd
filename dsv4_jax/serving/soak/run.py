"""Runs the traffic for a while and stops it now and then to look at the server."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from dsv4_jax.serving.client import Client
from dsv4_jax.serving.soak.traffic import Traffic, Unexpected
from dsv4_jax.serving.soak.watch import Bounds, Held, growth, held

QUIET_S = 60  # in which the server must be idle once nobody asks
LOOK_S = 0.2
BUSY_S = 0.2
MAX_FAULTS = 20  # then it ends early


@dataclass
class Soak:
    """Traffic from `workers` threads to the server `pid` for `minutes`.

    The first `warm_up` share is not judged: caches fill. From then on the server is looked at
    every `every_s` seconds.
    """

    client: Client
    pid: int
    minutes: float
    workers: int = 8
    seed: int = 0
    every_s: float = 30
    warm_up: float = 0.25
    bounds: Bounds = field(default_factory=Bounds)
    report: Callable[[str], None] = print
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    looks: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._go = threading.Event()
        self._end = threading.Event()
        self._under_way = 0
        self._changed = threading.Condition()

    def run(self) -> list[str]:
        """Returns what was wrong, in words; empty if nothing was."""
        traffic = Traffic(self.client, self.client.model()["max_model_len"])
        threads = [
            threading.Thread(target=self._work, args=(traffic, random.Random(f"{self.seed} {i}")))
            for i in range(self.workers)
        ]
        for thread in threads:
            thread.start()
        try:
            self._watch()
        finally:
            self._end.set()
            self._go.set()
            for thread in threads:
                thread.join()
        return [*self.faults, *growth(self.looks[0], self.looks[-1], self.bounds)]

    def _watch(self) -> None:
        start = time.monotonic()
        self.report(HEADER)
        pause_s = self.minutes * 60 * self.warm_up
        while (left_s := start + self.minutes * 60 - time.monotonic()) > 0:
            self._go.set()
            self._end.wait(min(pause_s, left_s))  # cut short when there are too many faults
            self._go.clear()
            self._look(time.monotonic() - start)
            if self._end.is_set():
                return
            pause_s = self.every_s

    def _look(self, passed_s: float) -> None:
        """Waits until nobody asks and the server has put everything away, and notes its state."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._under_way == 0, timeout=10 * QUIET_S):
                raise Unexpected("an answer takes too long")
        limit = time.monotonic() + QUIET_S
        while not (now := held(self.client, self.pid)).is_idle and time.monotonic() < limit:
            time.sleep(LOOK_S)
        self.looks.append(now)
        self.report(row(passed_s, self.done.total(), now))

    def _work(self, traffic: Traffic, rng: random.Random) -> None:
        while True:
            self._go.wait()
            if self._end.is_set():
                return
            with self._changed:
                if not self._go.is_set():
                    continue
                self._under_way += 1
            try:
                kind = traffic.one(rng)
                self.done[kind] += 1
                if kind == "busy":
                    time.sleep(BUSY_S)
            except Exception as error:
                self._fault(error)
            finally:
                with self._changed:
                    self._under_way -= 1
                    self._changed.notify_all()

    def _fault(self, error: Exception) -> None:
        known = isinstance(error, Unexpected)
        self.faults.append(str(error) if known else f"{type(error).__name__}: {error}")
        self.report(self.faults[-1])
        if len(self.faults) >= MAX_FAULTS:
            self._end.set()


HEADER = " seconds  requests  memory MiB  threads  files  tasks  running  pages"


def row(passed_s: float, requests: int, now: Held) -> str:
    tasks = "–" if now.tasks is None else str(now.tasks)
    return (
        f"{passed_s:>8.0f}  {requests:>8}  {now.memory_mib:>10.1f}  {now.threads:>7}  "
        f"{now.files:>5}  {tasks:>5}  {now.running:>7}  {now.pages:>5.3f}"
    )
