"""Where the state of requests that lost their slot waits for their return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dsv4_jax.serving.engine.request import Request


class Parking(Protocol):
    """Keeps the whole state of preempted requests, so that they go on to the bit.

    Calls come while a step is being planned. The slot and the pages that are parked may be given
    away in that step, and what is restored is read by it: both must be queued on the device in
    front of it.
    """

    def park(self, request: Request, slot: int, pages: Sequence[int]) -> None:
        """Copies the slot's ring state and the pages."""
        ...

    def resume(self, request: Request, slot: int, pages: Sequence[int]) -> None:
        """Fills a slot and the first pages of a table with what was parked, and forgets it."""
        ...

    def forget(self, request: Request) -> None:
        """Drops what was parked; the request has ended."""
        ...
