"""Places for ring state: what a sequence needs besides pages to go on from a 128-aligned point."""

from __future__ import annotations

from typing import Protocol

Handle = int


class CheckpointStore(Protocol):
    """Holds copies of slots under opaque handles; the tree says how long."""

    capacity: int  # checkpoints it can hold
    checkpoint_bytes: int

    def take(self) -> Handle | None:
        """Reserves room for one checkpoint; None when it is full."""
        ...

    def drop(self, handle: Handle) -> None:
        """Gives the room back."""
        ...


class CheckpointPool:
    """Handles are the rows of one preallocated array, so that shapes never change."""

    def __init__(self, capacity: int, checkpoint_bytes: int = 0) -> None:
        self.capacity = capacity
        self.checkpoint_bytes = checkpoint_bytes
        self._free = list(range(capacity - 1, -1, -1))
        self._taken: set[Handle] = set()

    @property
    def taken(self) -> frozenset[Handle]:
        return frozenset(self._taken)

    def take(self) -> Handle | None:
        if not self._free:
            return None
        handle = self._free.pop()
        self._taken.add(handle)
        return handle

    def drop(self, handle: Handle) -> None:
        assert handle in self._taken, f"checkpoint {handle} is not taken"
        self._taken.remove(handle)
        self._free.append(handle)
