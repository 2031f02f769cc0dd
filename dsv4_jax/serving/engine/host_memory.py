"""State in host memory: what the prefix cache evicts, and preempted requests.

Every call reads or writes the device's state at once, behind the steps that were queued before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4_jax.serving.engine.checkpoints import Handle
from dsv4_jax.serving.engine.copies import Copies, Copy
from dsv4_jax.serving.engine.device import bytes_of
from dsv4_jax.serving.engine.host import Unit
from dsv4_jax.serving.engine.request import Request, Status
from dsv4_jax.serving.engine.runner import PAGES_AT_ONCE, Runner

Entry = tuple[str, Unit]  # "page" or "checkpoint", of which unit


@dataclass(frozen=True)
class _Parked:
    rings: Copy
    pages: list[Copy]  # PAGES_AT_ONCE each


class HostMemory:
    """The `HostTier` of the prefix cache and the `Parking` of the scheduler.

    Args:
        runner: Whose state it copies.
        capacity: Bytes for what the prefix cache evicts, least recently used first to go; 0 keeps
            nothing. Preempted requests are kept whatever it takes: at most one context per slot.
        on_evict: Called for each page or checkpoint that goes.
    """

    def __init__(
        self, runner: Runner, capacity: int, on_evict: Callable[[], object] = lambda: None
    ) -> None:
        self.capacity = capacity
        self.used = 0  # bytes of the tier
        self._runner = runner
        self._on_evict = on_evict
        self._copies = Copies(runner.programs)
        self._parked: dict[Request, _Parked] = {}
        self._entries: OrderedDict[Entry, Copy] = OrderedDict()  # oldest use first
        self._staged: dict[Request, Mapping[Entry, Any]] = {}
        self._sizes: dict[Entry, int] = {}

    def settle(self) -> None:
        """Call it when a step has come back, so that copies do not stay on the device."""
        self._copies.settle()

    def clear(self) -> None:
        """Forgets the prefixes; preempted requests stay."""
        self._entries.clear()
        self._sizes.clear()
        self.used = 0

    # Second tier of the prefix cache.

    def save_page(self, units: Sequence[Unit], page: int) -> None:
        if self.capacity:
            copy = self._read_pages([page], 1)
            for unit in units:  # the last one last: it is worth most
                self._keep("page", unit, copy, bytes_of(copy.tree) // len(units))

    def has_unit(self, unit: Unit) -> bool:
        return self._has("page", unit)

    def load_page(self, unit: Unit, page: int) -> None:
        rows = self._used("page", unit)
        runner = self._runner
        pages = np.array([page], np.int32)
        runner.state = runner.programs.write_pages(runner.state, pages, rows)

    def save_checkpoint(self, unit: Unit, handle: Handle) -> None:
        if self.capacity:
            runner = self._runner
            rings = runner.programs.read_checkpoint(runner.state, np.int32(handle))
            self._keep("checkpoint", unit, self._copies.add(rings), bytes_of(rings))

    def has_checkpoint(self, unit: Unit) -> bool:
        return self._has("checkpoint", unit)

    def load_checkpoint(self, unit: Unit, handle: Handle) -> None:
        rings = self._used("checkpoint", unit)
        runner = self._runner
        runner.state = runner.programs.write_checkpoint(runner.state, np.int32(handle), rings)

    def _keep(self, kind: str, unit: Unit, copy: Copy, size: int) -> None:
        if (kind, unit) in self._entries:
            return
        self._entries[kind, unit] = copy
        self._sizes[kind, unit] = size
        self.used += size
        while self.used > self.capacity:
            key, _ = self._entries.popitem(last=False)
            self.used -= self._sizes.pop(key)
            self._on_evict()

    def _has(self, kind: str, unit: Unit) -> bool:
        entry = kind, unit
        return entry in self._entries or any(entry in held for held in self._staged.values())

    def _used(self, kind: str, unit: Unit) -> Any:
        entry = kind, unit
        if entry in self._entries:
            self._entries.move_to_end(entry)
            return self._entries[entry].tree
        return next(held[entry] for held in self._staged.values() if entry in held)

    # What was read from disk for requests that wait.

    def stage(self, request: Request, entries: Mapping[Entry, Any]) -> None:
        """Holds what a request will resume from until `unstage`, whatever the capacity."""
        self._staged[request] = entries

    def unstage(self) -> None:
        """Lets go of what requests that no longer wait had staged."""
        for request in [r for r in self._staged if r.status is not Status.WAITING]:
            del self._staged[request]

    @property
    def staged(self) -> int:
        """Requests with something staged."""
        return len(self._staged)

    # Parking of preempted requests.

    def park(self, request: Request, slot: int, pages: Sequence[int]) -> None:
        runner = self._runner
        rings = self._copies.add(runner.programs.read_slot(runner.state, np.int32(slot)))
        groups = [pages[i : i + PAGES_AT_ONCE] for i in range(0, len(pages), PAGES_AT_ONCE)]
        copies = [self._read_pages(group, PAGES_AT_ONCE) for group in groups]
        self._parked[request] = _Parked(rings, copies)

    def resume(self, request: Request, slot: int, pages: Sequence[int]) -> None:
        parked, runner = self._parked.pop(request), self._runner
        programs = runner.programs
        runner.state = programs.write_slot(runner.state, np.int32(slot), parked.rings.tree)
        for start, copy in enumerate(parked.pages):
            group = pages[start * PAGES_AT_ONCE :][:PAGES_AT_ONCE]
            targets = np.zeros(PAGES_AT_ONCE, np.int32)  # the scratch page behind the last one
            targets[: len(group)] = group
            runner.state = programs.write_pages(runner.state, targets, copy.tree)

    def forget(self, request: Request) -> None:
        self._parked.pop(request, None)

    def _read_pages(self, pages: Sequence[int], size: int) -> Copy:
        padded = np.zeros(size, np.int32)
        padded[: len(pages)] = pages
        return self._copies.add(self._runner.programs.read_pages(self._runner.state, padded))
