"""Plain version of the update: a scatter."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def update_rows(
    stores: tuple[Array, ...],
    new: tuple[Array, ...],
    owner_BJ: Array,
    first_B: Array,
    count_B: Array,
    layer: Array,
) -> tuple[Array, ...]:
    """Entries of the stores in new places; what is not counted is dropped."""
    size = stores[0].shape[2]
    steps = jnp.arange(new[0].shape[1], dtype=jnp.int32)[None]
    which_BT = first_B[:, None] + steps
    block_BT = jnp.clip(which_BT // size, 0, owner_BJ.shape[1] - 1)
    owner_BT = jnp.take_along_axis(owner_BJ, block_BT, axis=1)
    inside = (steps < count_B[:, None]) & (which_BT < size * owner_BJ.shape[1])
    entry_BT = jnp.where(inside, which_BT % size, size)  # out of range: dropped
    return tuple(
        store.at[layer, owner_BT, entry_BT].set(rows, mode="drop")
        for store, rows in zip(stores, new, strict=True)
    )
