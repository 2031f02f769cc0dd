"""Gathers whose transpose is a gather too: no scatter-add, so sums have one order everywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


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
