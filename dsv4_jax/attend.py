"""Core attention with a sink: one online softmax over window rows and compressed rows.

Keys are values (one shared head). No array of all queries × all rows is ever formed: queries come
in tiles, compressed rows in tiles of `cache.ROW_TILE`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.numerics import Numerics

NO_SCORE = -1e30  # of masked rows
NO_PEAK = -1e29  # maximum before any row was seen: finite, and masked rows vanish beside it


class SoftmaxState(NamedTuple):
    """Running maximum, denominator and weighted sum of an online softmax, float32."""

    peak_BTN1: Array
    total_BTN1: Array
    sum_BTNH: Array


def start(q_BTNH: Array) -> SoftmaxState:
    """State before any row was seen."""
    one = (*q_BTNH.shape[:-1], 1)
    return SoftmaxState(
        jnp.full(one, NO_PEAK, jnp.float32),
        jnp.zeros(one, jnp.float32),
        jnp.zeros(q_BTNH.shape, jnp.float32),
    )


def _einsum(expression: str, a: Array, b: Array) -> Array:
    return jnp.einsum(
        expression,
        a,
        b,
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST,
    )


def absorb(
    state: SoftmaxState, q_BTNH: Array, rows: Array, mask_BTS: Array, num: Numerics
) -> SoftmaxState:
    """Adds rows to the softmax: `[B, S, H]` shared by all queries, or `[B, T, S, H]` of their own.

    Scores are scaled by H^-1/2. Probabilities are rounded to the activation dtype for the sum but
    not in the denominator, as in the official kernel.
    """
    own = "T" if rows.ndim == 4 else ""
    scale = q_BTNH.shape[-1] ** -0.5
    scores = _einsum(f"BTNH,B{own}SH->BTNS", q_BTNH, rows) * scale
    scores = jnp.where(mask_BTS[:, :, None], scores, NO_SCORE)
    peak = jnp.maximum(state.peak_BTN1, scores.max(axis=-1, keepdims=True))
    probs = jnp.exp(scores - peak)  # 0 where masked
    decay = jnp.exp(state.peak_BTN1 - peak)
    added = _einsum(f"BTNS,B{own}SH->BTNH", num.cast(probs), rows)
    return SoftmaxState(
        peak,
        state.total_BTN1 * decay + probs.sum(axis=-1, keepdims=True),
        state.sum_BTNH * decay + added,
    )


def finish(state: SoftmaxState, sink_N: Array, num: Numerics) -> Array:
    """Output `[B, T, N, H]`; the sink joins the denominator only, unscaled."""
    sink = sink_N.astype(jnp.float32).reshape(1, 1, -1, 1)
    total = state.total_BTN1 + jnp.exp(sink - state.peak_BTN1)
    return num.cast(state.sum_BTNH / total)
