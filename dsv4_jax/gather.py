"""Gathers whose transpose is a gather too, and ranks without a sort.

No scatter-add, so sums have one order everywhere. Sorts and scatters to places that may repeat are
also what a TPU compiler takes longest for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BLOCK = 128  # entries that are ranked by one product


def _fill_take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def take(x: Array, index: Array, inverse: Array) -> Array:
    """`x[index]` along the first dimension, zero where `index` is out of range.

    `inverse` says, for every entry of `x`, where in the result it went (out of range: nowhere).
    No entry may go to two places. Indices are int32 and not negative.
    """
    del inverse
    return _fill_take(x, index)


def _forward(x: Array, index: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _fill_take(x, index), (index, inverse)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Any, ...]:
    index, inverse = saved
    none = (np.zeros(a.shape, jax.dtypes.float0) for a in (index, inverse))
    return (_fill_take(g, inverse), *none)


take.defvjp(_forward, _backward)


def take_rows(x_BTd: Array, index_BJ: Array, inverse_BT: Array) -> Array:
    """`take` along the second dimension, row by row of the batch: `[B, J, d]`."""
    (batch, size), count = x_BTd.shape[:2], index_BJ.shape[1]

    def flat(index: Array, limit: int) -> Array:
        row = jnp.arange(batch, dtype=jnp.int32)[:, None]
        return jnp.where(index < limit, row * limit + index, batch * limit).reshape(-1)

    out = take(x_BTd.reshape(batch * size, -1), flat(index_BJ, size), flat(inverse_BT, count))
    return out.reshape(batch, count, -1)


def ranks(owner_Y: Array, owners: int) -> tuple[Array, Array, Array]:
    """Of every entry, how many of the same owner stand in front of it; of every owner, how many.

    Returns rank_Y and count_E, int32, and is_own_EY. Entries of no owner in [0, owners) have rank
    0. Counted, not sorted: in blocks by a triangle of ones, exactly, and then over blocks.
    """
    entries = len(owner_Y)
    blocks = -(-entries // BLOCK)
    padded_Y = jnp.pad(owner_Y, (0, blocks * BLOCK - entries), constant_values=owners)
    owner_E1 = jnp.arange(owners, dtype=jnp.int32)[:, None]
    is_own_EY = padded_Y[None] == owner_E1
    is_own_Enb = is_own_EY.reshape(owners, blocks, BLOCK)
    earlier_bb = jnp.triu(jnp.ones((BLOCK, BLOCK), jnp.float32), 1)
    inside_Enb = jnp.einsum("Enb,bc->Enc", is_own_Enb.astype(jnp.float32), earlier_bb)
    size_En = is_own_Enb.sum(axis=2, dtype=jnp.int32)
    before_En = jnp.cumsum(size_En, axis=1) - size_En
    rank_Enb = inside_Enb.astype(jnp.int32) + before_En[:, :, None]
    rank_Y = jnp.where(is_own_Enb, rank_Enb, 0).sum(axis=0).reshape(-1)[:entries]
    return rank_Y, size_En.sum(axis=1), is_own_EY[:, :entries]


def places(rank_Y: Array, first_E: Array, is_own_EY: Array, nowhere: int) -> Array:
    """Rank behind the first place of the owner; entries of no owner: distinct from `nowhere` on."""
    first_Y = jnp.where(is_own_EY, first_E[:, None], 0).sum(axis=0)
    outside_Y = nowhere + jnp.arange(len(rank_Y), dtype=jnp.int32)
    return jnp.where(is_own_EY.any(axis=0), first_Y + rank_Y, outside_Y).astype(jnp.int32)


def invert(place_Y: Array, size: int) -> Array:
    """Which entry has each of `size` places (Y: none), for places that are distinct."""
    entries = len(place_Y)
    empty = jnp.full(size, entries, jnp.int32)
    number_Y = jnp.arange(entries, dtype=jnp.int32)
    return empty.at[place_Y].set(number_Y, mode="drop", unique_indices=True)
