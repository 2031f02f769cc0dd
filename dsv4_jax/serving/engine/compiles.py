"""Counts compilations, so that none goes unnoticed once requests are being served."""

from __future__ import annotations

import threading

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"  # fires for loads from the cache too
_thread = threading.local()


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _EVENT:
        _thread.count = compiled_here() + 1


def compiled_here() -> int:
    """Programs that this thread has compiled or loaded since it began."""
    return getattr(_thread, "count", 0)


jax.monitoring.register_event_duration_secs_listener(_listen)
