"""Attention with a sink, written to be read: float32, all scores at once, one softmax."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

BLOCK = 64  # channels that share a scale


def unpack_rows(values: Array, scales: Array, channels: int) -> Array:
    """Float32 rows `[..., H]` of bytes: FP8 codes, then bfloat16; e8m0 scales."""
    codes, pairs = jnp.split(values, [2 * channels - values.shape[-1]], axis=-1)
    codes = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    powers = lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu).astype(jnp.float32)
    still = codes * jnp.repeat(powers, BLOCK, axis=-1)[..., : codes.shape[-1]]  # some may be left
    pairs = pairs.reshape(*pairs.shape[:-1], -1, 2)
    rest = lax.bitcast_convert_type(pairs, jnp.bfloat16).astype(jnp.float32)
    return jnp.concatenate([still, rest], axis=-1)


def plain_rows(rows: Array) -> Array:
    """Float32 rows of floats, or of bfloat16 bits kept as uint16."""
    if rows.dtype == jnp.uint16:
        rows = lax.bitcast_convert_type(rows, jnp.bfloat16)
    return rows.astype(jnp.float32)


def attend(q_BTNH: Array, rows_BTSH: Array, mask_BTS: Array, sink_N: Array) -> tuple[Array, Array]:
    """Softmax over the masked rows and the sink, which has no value; logarithm of its denominator.

    rows: `[B, T, S, H]`, or `[B, 1, S, H]` shared by all queries. Probabilities are rounded to the
    queries' dtype in front of the sum, relative to the row's maximum, not in the denominator.
    """
    q, exact = q_BTNH.astype(jnp.float32), lax.Precision.HIGHEST
    rows = jnp.broadcast_to(rows_BTSH, (*q.shape[:2], *rows_BTSH.shape[2:]))
    scores = jnp.einsum("BTNH,BTSH->BTNS", q, rows, precision=exact) * q.shape[-1] ** -0.5
    scores = jnp.where(mask_BTS[:, :, None], scores, -jnp.inf)
    sink = sink_N.astype(jnp.float32).reshape(1, 1, -1, 1)
    peak = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
    probs = jnp.exp(scores - peak)
    total = probs.sum(axis=-1, keepdims=True) + jnp.exp(sink - peak)
    probs = _round(probs, q_BTNH.dtype)
    out = jnp.einsum("BTNS,BTSH->BTNH", probs, rows, precision=exact) / total
    return _round(out, q_BTNH.dtype), (peak + jnp.log(total))[..., 0]


def _round(x: Array, dtype: jnp.dtype) -> Array:
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x


def turn_back(out_BTNH: Array, cos_BTr: Array, sin_BTr: Array) -> Array:
    """Inverse rotation of the interleaved pairs in the last channels, in float32."""
    rope_dim = 2 * cos_BTr.shape[-1]
    still, turned = out_BTNH[..., :-rope_dim], out_BTNH[..., -rope_dim:]
    a, b = turned[..., 0::2], turned[..., 1::2]
    cos, sin = cos_BTr[:, :, None], sin_BTr[:, :, None]
    pairs = jnp.stack([a * cos + b * sin, b * cos - a * sin], axis=-1)
    return jnp.concatenate([still, pairs.reshape(turned.shape)], axis=-1)
