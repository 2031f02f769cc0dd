"""Counts compilations, so that none goes unnoticed once requests are being served."""

from __future__ import annotations

import threading

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"  # fires for loads from the cache too


class CompileCounter:
    """Programs this process compiled or loaded since it began, on whatever thread."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_s: float, **_: str | int) -> None:
        if event == _EVENT:
            with self._lock:
                self.total += 1


compiles = CompileCounter()  # JAX keeps its listeners for good, so there is one for all engines
