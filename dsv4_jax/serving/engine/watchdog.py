"""Notices a step that does not come back."""

from __future__ import annotations

import faulthandler
import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)
CHECKS = 4  # per time limit


class EngineStuck(RuntimeError):
    """The device, or something the engine waits for, did not answer in time."""


class Watchdog:
    """Calls `on_stuck` once, when the engine has been busy with one step for too long.

    Args:
        limit_s: How long a step may take.
        busy_for: Seconds the engine has been at its step; 0 when it waits for work.
        on_stuck: Gets the reason.
    """

    def __init__(
        self,
        limit_s: float,
        busy_for: Callable[[], float],
        on_stuck: Callable[[EngineStuck], object],
    ) -> None:
        self.limit_s = limit_s
        self._busy_for = busy_for
        self._on_stuck = on_stuck
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> bool:
        """Looks once; returns whether the engine is stuck."""
        busy_s = self._busy_for()
        if busy_s <= self.limit_s:
            return False
        self._on_stuck(EngineStuck(f"a step has not come back for {busy_s:.0f} s"))
        return True

    def _run(self) -> None:
        while not self._stop.wait(self.limit_s / CHECKS):
            if self.check():
                log.error("the engine is stuck; stacks of all threads follow on stderr")
                faulthandler.dump_traceback()
                return
