"""The one table from dimension names to mesh axes; a name that is not in it is an error.

A weight's dimension is split in two ways. The axes of its name split the work. Axes under which the
name is also `stored` only store it: a layer's weights are joined along them before use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from sharding.mesh import AXES

Names = Sequence[str | None]
BATCH = ("data", "fsdp", "expert")
BY_COMPILER = "tensor"  # of training: programs do not speak across it, see `manual_spec`

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
    """A named table, and axes over which weights are stored beyond those that split the work."""

    name: str
    table: tuple[tuple[str, tuple[str, ...]], ...]
    stored: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes that split the work along a dimension; None is never split.

        Raises:
            ValueError: the table has no such name.
        """
        if name is None:
            return ()
        table = dict(self.table)
        if name not in table:
            raise ValueError(f"dimension {name!r} has no rule in {self.name}: {sorted(table)}")
        return table[name]

    def stored_axes(self, name: str | None) -> tuple[str, ...]:
        """Axes over which a dimension of a weight is stored as well."""
        return dict(self.stored).get(name, ()) if name else ()

    @property
    def gathered(self) -> frozenset[str]:
        """Axes along which weights are joined before use."""
        return frozenset(axis for _, axes in self.stored for axis in axes)


def make_rules(
    name: str, stored: dict[str, tuple[str, ...]] | None = None, **changes: tuple[str, ...]
) -> Rules:
    """The common table with some entries replaced.

    Raises:
        ValueError: an unknown mesh axis.
    """
    table, stored = _COMMON | changes, stored or {}
    for key, axes in (*table.items(), *stored.items()):
        if unknown := set(axes) - set(AXES):
            raise ValueError(f"{name}: {key!r} names unknown axes {sorted(unknown)}")
    return Rules(name, tuple(table.items()), tuple(stored.items()))


# Serving never moves weights: `fsdp` is one more axis of experts.
SERVE = make_rules("SERVE", experts=("fsdp", "expert", "context", "tensor"))
# In training the compiler splits what `tensor` splits, and routed experts are whole along it.
TRAIN = make_rules(
    "TRAIN",
    dict.fromkeys(("embed", "q_rank", "group_channels"), ("fsdp",)),
    experts=("expert", "context"),
)
# An engine whose devices all see every request: one state, repeated; weights split as for serving.
ENGINE = make_rules("ENGINE", experts=("expert", "tensor"), batch=(), slots=(), pages=())
RULES = {"serve": SERVE, "train": TRAIN, "engine": ENGINE}


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
    store: also split along stored axes, where they divide; an axis is used once per array. Vectors
        stay whole along them, alone or in a stack of layers.

    Raises:
        ValueError: a dimension has no rule, or does not divide.
    """
    blocks = blocks or [1] * len(shape)
    used, is_vector = set(), sum(name != "layers" for name in names) == 1
    entries: list[tuple[str, ...]] = []
    for name, size, block in zip(names, shape, blocks, strict=True):
        axes = tuple(a for a in rules.axes(name) if sizes[a] > 1 and a not in used)
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
        for axis in rules.stored_axes(name) if store and not is_vector else ():
            parts = math.prod(sizes[a] for a in entries[at]) * sizes[axis]
            if axis not in used and sizes[axis] > 1 and size % parts == 0:
                used.add(axis)
                entries[at] = (*entries[at], axis)
    return PartitionSpec(*(_entry(axes) for axes in entries))


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes if len(axes) > 1 else axes[0] if axes else None


def manual_spec(spec: PartitionSpec) -> PartitionSpec:
    """A placement as programs see it that leave an axis to the compiler: without that axis."""
    kept = [tuple(axis for axis in entry_axes(entry) if axis != BY_COMPILER) for entry in spec]
    return PartitionSpec(*map(_entry, kept))


def entry_axes(entry: object) -> tuple[str, ...]:
    """Axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)  # type: ignore[arg-type]
