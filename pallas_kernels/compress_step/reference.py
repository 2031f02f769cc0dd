"""Plain version: scatter into the rings, then pool every ring whether it is complete or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def compress_step(
    values: Array,
    scores: Array,
    new_values_BW: Array,
    new_scores_BW: Array,
    slots_B: Array,
    pos_B: Array,
    count_B: Array,
    layer: Array,
    ratio: int,
) -> tuple[Array, Array, Array]:
    """See `api.compress_step`."""
    length, width = values.shape[2:]
    entry_B = jnp.where(count_B > 0, pos_B % length, length)  # out of range: dropped
    values = values.at[layer, slots_B, entry_B].set(new_values_BW, mode="drop")
    scores = scores.at[layer, slots_B, entry_B].set(new_scores_BW, mode="drop")
    done_B = (count_B > 0) & ((pos_B + 1) % ratio == 0)
    values_BRW, scores_BRW = values[layer, slots_B], scores[layer, slots_B]
    if length > ratio:
        half = width // 2
        own_BR = jnp.arange(length)[None] // ratio == (pos_B % length // ratio)[:, None]
        before_BR = ~own_BR & (pos_B >= ratio)[:, None]
        seen = jnp.concatenate([before_BR, own_BR], axis=1)[..., None]
        values_BRW = jnp.concatenate([values_BRW[..., :half], values_BRW[..., half:]], axis=1)
        scores_BRW = jnp.concatenate([scores_BRW[..., :half], scores_BRW[..., half:]], axis=1)
        scores_BRW = jnp.where(seen, scores_BRW, -jnp.inf)
    rows_Bd = (jax.nn.softmax(scores_BRW, axis=1) * values_BRW).sum(axis=1)
    return jnp.where(done_B[:, None], rows_Bd, 0), values, scores
