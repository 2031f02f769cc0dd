"""Cuts the layer schedule into repeating groups, so that compile time does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax.config import ModelConfig

MAX_PATTERN = 8  # longest repeating pattern that is looked for


class LayerKind(NamedTuple):
    """What distinguishes the program of one layer from that of another."""

    ratio: int
    is_hash: bool


class Group(NamedTuple):
    """`repeats` runs of the same `kinds`, starting at layer `start`."""

    start: int
    kinds: tuple[LayerKind, ...]
    repeats: int

    def layers(self, offset: int) -> range:
        """Layers that stand at `offset` of the pattern, one per repeat."""
        step = len(self.kinds)
        return range(self.start + offset, self.start + step * self.repeats, step)


@lru_cache
def layer_groups(cfg: ModelConfig, scan: bool = True) -> tuple[Group, ...]:
    """Groups in layer order with the fewest layer programs; without `scan`, one layer each."""
    kinds = tuple(LayerKind(cfg.ratio(i), cfg.is_hash(i)) for i in range(cfg.num_layers))
    if not scan:
        return tuple(Group(i, (kind,), 1) for i, kind in enumerate(kinds))
    # best[i]: fewest (programs, groups) for the layers from i on, and the group to start with
    best: list[tuple[int, int, Group | None]] = [(0, 0, None)] * (len(kinds) + 1)
    for i in reversed(range(len(kinds))):
        options = []
        for size in range(1, min(MAX_PATTERN, len(kinds) - i) + 1):
            pattern, repeats = kinds[i : i + size], 1
            while kinds[i + size * repeats : i + size * (repeats + 1)] == pattern:
                repeats += 1
            for count in {1, repeats}:
                programs, groups, _ = best[i + size * count]
                options.append((size + programs, 1 + groups, Group(i, pattern, count)))
        best[i] = min(options, key=lambda option: option[:2])
    found, i = [], 0
    while i < len(kinds):
        group = best[i][2]
        assert group is not None
        found.append(group)
        i += len(group.kinds) * group.repeats
    return tuple(found)


def stack_layers(groups: Sequence[Group], load: Callable[[int], Any]) -> list[list[Any]]:
    """Parameters per group and pattern offset; repeated layers are stacked on a new first axis.

    `load(layer)` gives one layer's tree. A stack is filled in place, one layer at a time, so that
    no layer is held twice. It is spread over devices as its first layer is.
    """
    return [
        [_stack(group.layers(offset), load) for offset in range(len(group.kinds))]
        if group.repeats > 1
        else [load(group.start + offset) for offset in range(len(group.kinds))]
        for group in groups
    ]


def _stack(layers: range, load: Callable[[int], Any]) -> Any:
    def empty(a: jax.Array) -> jax.Array:
        is_real = isinstance(a, jax.Array) and not isinstance(a, core.Tracer)
        placed = None
        if is_real and isinstance(a.sharding, NamedSharding):
            placed = NamedSharding(a.sharding.mesh, PartitionSpec(None, *a.sharding.spec))
        return jnp.zeros((len(layers), *a.shape), a.dtype, device=placed)

    first = load(layers[0])
    stack = jax.tree.map(empty, first)
    stack = _put(stack, first, jnp.int32(0))
    for index, layer in enumerate(layers[1:], start=1):
        stack = _put(stack, load(layer), jnp.int32(index))
    return stack


@partial(jax.jit, donate_argnums=0)
def _put(stack: Any, layer: Any, index: jax.Array) -> Any:
    return jax.tree.map(
        lambda s, a: jax.lax.dynamic_update_index_in_dim(s, a.astype(s.dtype), index, 0),
        stack,
        layer,
    )
