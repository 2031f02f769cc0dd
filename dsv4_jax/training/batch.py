"""Packed batches: several documents in one row, none of which sees another."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Batch(NamedTuple):
    """Rows of packed documents; all `[B, T]` int32.

    segment_BT: number of the document a token belongs to; 0 is padding. Documents are contiguous.
    position_BT: place of the token in its document, from 0.
    learn_BT: 1 where the token may be a target (in chat data: what the assistant says).
    """

    tokens_BT: Array
    segment_BT: Array
    position_BT: Array
    learn_BT: Array


def ahead(x_BT: Array, steps: int) -> Array:
    """`x` at t + steps; zeros behind the end."""
    return jnp.pad(x_BT[:, steps:], ((0, 0), (0, min(steps, x_BT.shape[1]))))


def target_mask(batch: Batch, steps: int) -> Array:
    """Where token t + steps belongs to t's document and may be learnt: bool `[B, T]`."""
    inside_BT = ahead(batch.segment_BT, steps) == batch.segment_BT
    return inside_BT & (batch.segment_BT > 0) & (ahead(batch.learn_BT, steps) > 0)


def unpacked(tokens_BT: Array) -> Batch:
    """Rows that hold one document each, all of it learnt."""
    ones_BT = jnp.ones_like(tokens_BT)
    position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    return Batch(tokens_BT, ones_BT, position_BT.astype(jnp.int32), ones_BT)
