"""Root-mean-square normalisation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.numerics import Numerics


def rms_norm(x: Array, weight: Array, eps: float, num: Numerics) -> Array:
    """Normalises the last dimension; all in float32, rounded once at the end."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return num.cast(weight * (x32 * scale))


def head_norm(x: Array, eps: float, num: Numerics) -> Array:
    """Weightless norm of each query head.

    The official code runs it in the tensor dtype: square, mean, sum, rsqrt and product each round.
    """
    cast = num.cast if num.rounds else lambda a: a

    def up(a: Array) -> Array:
        return a.astype(jnp.float32)

    square = cast(up(x) * up(x))
    mean = cast(jnp.mean(up(square), axis=-1, keepdims=True))
    scale = cast(lax.rsqrt(up(cast(up(mean) + eps))))
    return num.cast(up(x) * up(scale))
