"""One cached unit, and what a request gets when it finds some."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_jax.serving.engine.checkpoints import Handle
from dsv4_jax.serving.engine.units import UNIT

COST_DOUBLES_AT = 65_536  # tokens of context that make one more token twice as dear to compute


@dataclass(eq=False, slots=True)
class Node:
    """One cached unit. It leaves the tree only without children, pins and readers."""

    key: bytes
    ids: bytes
    parent: Node | None
    depth: int  # units up to here, this one included
    page: int
    touched: float = 0.0  # the cache's clock when it was last used
    used: int = 0  # order of the last use
    children: int = 0
    pins: int = 0  # requests that go on from here
    checkpoint: Handle | None = None
    gap: int = 0  # tokens since the checkpoint before, when this one was attached
    readers: int = 0  # restores of the checkpoint under way

    @property
    def unit(self) -> tuple[bytes, bytes]:
        return self.key, self.ids

    @property
    def is_evictable(self) -> bool:
        return not (self.children or self.pins or self.readers)

    @property
    def value(self) -> tuple[float, int]:
        """Sorts what to keep: recently used, then dear to compute again (GreedyDual)."""
        gap = self.gap if self.checkpoint is not None else 0  # without one nobody can resume here
        return self.touched + gap * (1 + self.depth * UNIT / COST_DOUBLES_AT), self.used


@dataclass(frozen=True, slots=True)
class Hit:
    """Where a request may resume. Its node and checkpoint are pinned.

    `pages` are complete and to be shared, `copy_from` holds the first rows of the page behind them.
    `matched` tokens are in the tree, though only `tokens` can be restored.
    """

    node: Node | None = None
    tokens: int = 0
    matched: int = 0
    pages: tuple[int, ...] = ()
    copy_from: int | None = None
