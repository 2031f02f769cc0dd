"""Trees of arrays on their way from the device to host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from dsv4_jax.serving.engine.mirror import Mirror
from dsv4_jax.serving.engine.programs import Programs


@dataclass(eq=False)
class Copy:
    """A tree that was read: on the device, and NumPy's once `Copies.settle` was called."""

    tree: Any


class Copies:
    """Starts copies at once and takes them when a step has come back, so that nobody waits."""

    def __init__(self, programs: Programs | Mirror) -> None:
        self._programs = programs
        self._under_way: list[Copy] = []

    def add(self, tree: Any) -> Copy:
        copy = Copy(tree)
        self._programs.tie(copy, tree)
        for leaf in jax.tree.leaves(tree):
            leaf.copy_to_host_async()
        self._under_way.append(copy)
        return copy

    def settle(self) -> None:
        """Lets go of the device's memory; waits until the copies are made."""
        for copy in self._under_way:
            copy.tree = jax.device_get(copy.tree)
        self._under_way.clear()
