"""Plain version: softmax over the tokens of a row, separately for every channel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def pool_windows(values: Array, scores: Array, first_B: Array, ratio: int, overlaps: bool) -> Array:
    """Float32 rows `[B, C, d]` of windows `[B, (C or C + 1)·ratio, W]`."""

    def windows(a: Array) -> Array:
        return a.reshape(len(a), -1, ratio, a.shape[-1])

    values, scores = windows(values), windows(scores)
    if overlaps:
        half, count = values.shape[-1] // 2, values.shape[1] - 1
        is_first = (first_B[:, None] + jnp.arange(count)[None] == 0)[..., None, None]
        before = jnp.where(is_first, -jnp.inf, scores[:, :-1, :, :half])
        values = jnp.concatenate([values[:, :-1, :, :half], values[:, 1:, :, half:]], axis=2)
        scores = jnp.concatenate([before, scores[:, 1:, :, half:]], axis=2)
    return (jax.nn.softmax(scores, axis=2) * values).sum(axis=2)
