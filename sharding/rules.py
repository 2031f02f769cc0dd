"""The one table from dimension names to mesh axes; a name that is not in it is an error.

A weight's dimension is split over the axes of its name in two ways. Axes in `gathered` only store
it: a layer's weights are joined along them before use. All others split the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from sharding.mesh import AXES

Names = Sequence[str | None]
BATCH = ("data", "fsdp", "expert")

# What both tables share: activations, caches, and the work of weights.
_COMMON: dict[str, tuple[str, ...]] = {
    "batch": BATCH,
    "slots": BATCH,  # of a serving engine
    "pages": BATCH,
    "sequence": ("context",),
    "context": ("context",),
    "experts": ("expert", "context", "tensor"),
    "heads": ("tensor",),
    "o_groups": ("tensor",),
    "mlp": ("tensor",),  # of the shared expert
    "vocab": ("tensor",),
    "expert_mlp": (),
    "embed": (),
    "embed_streams": (),
    "q_rank": (),
    "group_channels": (),
    "index_heads": (),  # each device scores with all heads: sums over heads come before choosing
    "layers": (),
    "router_experts": (),
    "hash_rows": (),
}


@dataclass(frozen=True)
class Rules:
    """A named table. `gathered`: axes over which weights are stored but not worked on."""

    name: str
    table: tuple[tuple[str, tuple[str, ...]], ...]
    gathered: tuple[str, ...] = ()

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes of a dimension name; None is never split.

        Raises:
            ValueError: the table has no such name.
        """
        if name is None:
            return ()
        table = dict(self.table)
        if name not in table:
            raise ValueError(f"dimension {name!r} has no rule in {self.name}: {sorted(table)}")
        return table[name]

    def work_axes(self, name: str | None) -> tuple[str, ...]:
        """Axes that split the work along a dimension of a weight."""
        return tuple(axis for axis in self.axes(name) if axis not in self.gathered)


def make_rules(name: str, gathered: tuple[str, ...] = (), **changes: tuple[str, ...]) -> Rules:
    """The common table with some entries replaced.

    Raises:
        ValueError: an unknown mesh axis.
    """
    table = _COMMON | changes
    for key, axes in table.items():
        if unknown := set(axes) - set(AXES):
            raise ValueError(f"{name}: {key!r} names unknown axes {sorted(unknown)}")
    return Rules(name, tuple(table.items()), gathered)


# Serving never moves weights: `fsdp` is one more axis of experts.
SERVE = make_rules("SERVE", experts=("fsdp", "expert", "context", "tensor"))
TRAIN = make_rules(
    "TRAIN",
    gathered=("fsdp",),
    embed=("fsdp",),
    q_rank=("fsdp",),
    group_channels=("fsdp",),
)
RULES = {"serve": SERVE, "train": TRAIN}


def spec_of(
    rules: Rules,
    names: Names,
    shape: Sequence[int],
    sizes: dict[str, int],
    blocks: Sequence[int] | None = None,
    label: str = "array",
    store: bool = True,
) -> PartitionSpec:
    """Placement of an array whose dimensions have these names, over axes of these `sizes`.

    blocks: work along a dimension may only be cut at multiples of this (elements of one scale).
    store: also split along the gathered axes, where they divide; an axis is used once per array.
        Vectors stay whole along them.

    Raises:
        ValueError: a dimension has no rule, or does not divide.
    """
    blocks = blocks or [1] * len(shape)
    used: set[str] = set()
    entries: list[tuple[str, ...]] = []
    for name, size, block in zip(names, shape, blocks, strict=True):
        axes = tuple(a for a in rules.work_axes(name) if sizes[a] > 1 and a not in used)
        parts = math.prod(sizes[a] for a in axes)
        if parts > 1 and size % (parts * block):
            cut = f" in blocks of {block}" if block > 1 else ""
            raise ValueError(
                f"{label}: dimension {name!r} of size {size} does not divide into {parts} parts"
                f"{cut} (axes {', '.join(axes)})"
            )
        used |= set(axes)
        entries.append(axes)
    for at, (name, size) in enumerate(zip(names, shape, strict=True)):
        for axis in rules.axes(name) if store and len(shape) > 1 else ():
            parts = math.prod(sizes[a] for a in entries[at]) * sizes[axis]
            is_free = axis in rules.gathered and axis not in used and sizes[axis] > 1
            if is_free and size % parts == 0:
                used.add(axis)
                entries[at] = (*entries[at], axis)
    return PartitionSpec(*(_entry(axes) for axes in entries))


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes if len(axes) > 1 else axes[0] if axes else None


def entry_axes(entry: object) -> tuple[str, ...]:
    """Axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)  # type: ignore[arg-type]
