"""What a device knows of the others: collectives named by dimensions, nothing where there is one.

Programs over many devices run inside one `jax.shard_map` over all axes; functions here are the only
ones that speak across it. Without a mesh every count is 1 and every function returns its input, so
model code has one path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from sharding.mesh import AXES, MeshSizes
from sharding.rules import SERVE, Names, Rules, entry_axes, spec_of

EXCHANGES = ("gather", "ragged", "padded")
WHOLE = 16  # devices of a slice up to which a gather over all of them stays one
NEIGHBOURS = 4  # of the first of two stages of a gather: a host's, or an edge of the smallest cube
ROW_BLOCK = 128  # compressed rows that lie together; blocks go to shards in turn


@dataclass(frozen=True)
class Shards:
    """The mesh a program runs on, and how it uses it. Hashable, so modules may hold it.

    mesh: None is a single device; `MeshSizes` is enough to know what would lie where.

    row_block: compressed row j lies on shard (j ÷ row_block) mod n of the `context` axis.
    exchange: how tokens reach their experts; None: by the size of the group (`dsv4_jax.exchange`).
    split: the tokens of this program are split along `context`; else every shard has all.

    Raises:
        ValueError: an unknown exchange.
    """

    mesh: Mesh | MeshSizes | None = None
    rules: Rules = SERVE
    row_block: int = ROW_BLOCK
    exchange: str | None = None
    split: bool = False

    def __post_init__(self) -> None:
        if self.exchange is not None and self.exchange not in EXCHANGES:
            raise ValueError(f"exchange={self.exchange!r} must be None or one of {EXCHANGES}")

    def size(self, axis: str) -> int:
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def axes(self, name: str) -> tuple[str, ...]:
        """Axes of more than one device that split the work along a dimension."""
        return tuple(axis for axis in self.rules.axes(name) if self.size(axis) > 1)

    def count(self, name: str) -> int:
        """Parts that a dimension is split into."""
        return math.prod(self.size(axis) for axis in self.axes(name))

    def rank(self, name: str) -> Array:
        """Which of the parts this device holds."""
        return self.rank_along(self.axes(name))

    def rank_along(self, axes: Sequence[str]) -> Array:
        """This device's number along `axes`, the first one slowest."""
        rank = jnp.int32(0)
        for axis in axes:
            rank = rank * self.size(axis) + lax.axis_index(axis)
        return rank

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes along which devices work on different tokens."""
        own = self.axes("batch")
        return (*own, *self.axes("context")) if self.split else own

    def total(self, x: Array, name: str) -> Array:
        """Σ of float32 parts over the shards of a dimension, in rank order on every device."""
        return ordered_total(x, self.axes(name), self.count(name))

    def one_of(self, x: Array, name: str, is_mine: Array) -> Array:
        """The value of the one shard where `is_mine` holds, on all of them. Exact."""
        axes = self.axes(name)
        return lax.psum(jnp.where(is_mine, x, jnp.zeros_like(x)), axes) if axes else x

    def join(self, x: Array, name: str, dim: int) -> Array:
        """Parts of all shards of a dimension, side by side along `dim`."""
        axes, count = self.axes(name), self.count(name)
        if not axes:
            return x
        # Of a gather over all devices of a large torus (v5p, TPU7x) the compiler makes a sum, which
        # sends twice as much; not so over neighbours and then over what they have: the same bytes.
        assert self.mesh is not None
        whole = count == math.prod(self.mesh.shape.values()) and count > WHOLE
        for groups in two_stages(count) if whole else [None]:
            x = lax.all_gather(x, axes, axis=dim, tiled=True, axis_index_groups=groups)
        return x

    def spec(
        self,
        names: Names,
        shape: Sequence[int],
        blocks: Sequence[int] | None = None,
        label: str = "array",
        store: bool = True,
    ) -> PartitionSpec:
        """Placement of an array, see `rules.spec_of`."""
        sizes = {axis: self.size(axis) for axis in AXES}
        return spec_of(self.rules, names, shape, sizes, blocks, label, store)

    def local_shape(self, spec: PartitionSpec, shape: Sequence[int]) -> tuple[int, ...]:
        """Sizes of one device's part."""
        entries = [*spec, *[None] * (len(shape) - len(spec))]
        parts = [math.prod(self.size(axis) for axis in entry_axes(entry)) for entry in entries]
        return tuple(size // count for size, count in zip(shape, parts, strict=True))

    def gather_stored(self, x: Array, spec: PartitionSpec) -> Array:
        """A weight joined along the axes that only store it, in the order of its placement."""
        for dim, entry in enumerate(spec):
            stored = tuple(axis for axis in entry_axes(entry) if axis in self.rules.gathered)
            if stored:
                x = lax.all_gather(x, stored, axis=dim, tiled=True)
        return x


SINGLE = Shards()


def two_stages(count: int) -> list[list[list[int]] | None]:
    """Groups of devices whose gathers, one after the other, are one over all of them, in order."""
    if count % NEIGHBOURS:
        return [None]
    near = [list(range(n, n + NEIGHBOURS)) for n in range(0, count, NEIGHBOURS)]
    far = [list(range(n, count, NEIGHBOURS)) for n in range(NEIGHBOURS)]
    return [near, far]


def ordered_total(x: Array, axes: tuple[str, ...], count: int) -> Array:
    """Σ over devices in rank order: same result everywhere and in every run, as cheap as a psum."""
    if count == 1:
        return x
    if x.shape[-1] % count:
        return ordered_sum(lax.all_gather(x, axes))
    return lax.all_gather(ordered_scatter(x, axes, count, -1), axes, axis=x.ndim - 1, tiled=True)


def ordered_scatter(x: Array, axes: tuple[str, ...], count: int, dim: int) -> Array:
    """This device's part along `dim` of Σ over devices, added in rank order."""
    if count == 1:
        return x
    dim %= x.ndim
    parts = x.reshape(*x.shape[:dim], count, x.shape[dim] // count, *x.shape[dim + 1 :])
    parts = jnp.moveaxis(parts, dim, 0)
    return ordered_sum(lax.all_to_all(parts, axes, 0, 0, tiled=True))


def ordered_sum(parts: Array) -> Array:
    """Σ over the first dimension, first to last."""
    total = parts[0]
    for n in range(1, len(parts)):
        total = total + parts[n]
    return total
