"""Packed batches: several documents in one row, none of which sees another."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Rollout(NamedTuple):
    """What was noted when documents were drawn from a model; all `[B, T]`.

    old_BT: float32, log-probability that the sampler gave a token. advantage_BT: float32, of its
    document. teacher_BT: int32, which teacher its document is for; -1: all.
    """

    old_BT: Array
    advantage_BT: Array
    teacher_BT: Array


class Batch(NamedTuple):
    """Rows of packed documents; all `[B, T]` int32.

    segment_BT: number of the document a token belongs to; 0 is padding. Documents are contiguous.
    position_BT: place of the token in its document, from 0.
    learn_BT: 1 where the token may be a target (in chat data: what the assistant says).
    rollout: of documents that a model drew; None of others.
    """

    tokens_BT: Array
    segment_BT: Array
    position_BT: Array
    learn_BT: Array
    rollout: Rollout | None = None


def from_fields(fields: np.ndarray) -> Batch:
    """A batch of numpy arrays from int32 `[4 or 7, …]`: of documents, or of rollouts (floats as
    their bits)."""
    first, rest = fields[:4], fields[4:]
    if not len(rest):
        return Batch(*first)
    old, advantage, teacher = rest
    return Batch(*first, Rollout(old.view(np.float32), advantage.view(np.float32), teacher))  # type: ignore[arg-type]


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
